"""Orthogonalising a bank at once, beside a loop over its matrices and the challenge baseline's function."""

import pytest
import torch
from harness import Work
from peers import peer
from shapes import SHAPES, name, text

from pgolf import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 5


def one_by_one(function):
    return lambda bank: torch.stack([function(matrix) for matrix in bank])


def work(shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """The plain chain's FLOPs (4n²m + 2n³ a step), with no use of symmetry."""
    count, n, m = shape[0], min(shape[1:]), max(shape[1:])
    return Work(bytes=2 * count * n * m * dtype.itemsize, flops=STEPS * count * (4 * n * n * m + 2 * n**3))


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("case", SHAPES.banks)
def test_newton_schulz(measure, case, dtype):
    shape = SHAPES.banks[case]

    def make():
        return (torch.randn(shape, device=DEVICE).to(dtype),)

    ops.newton_schulz(*make())
    measure(
        "newton_schulz",
        case,
        shape=text(shape),
        dtype=name(dtype),
        backend=ops.used()["newton_schulz"],
        make=make,
        call=lambda bank: ops.newton_schulz(bank, steps=STEPS),
        others={"one by one": one_by_one(lambda matrix: ops.newton_schulz(matrix, steps=STEPS))},
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        work=work(shape, dtype),
    )


@pytest.mark.parametrize("case", SHAPES.banks)
def test_newton_schulz_quintic_beside_the_challenge_baseline(measure, case):
    theirs = peer("parameter_golf").zeropower_via_newtonschulz5
    shape, dtype = SHAPES.banks[case], torch.bfloat16
    measure(
        "newton_schulz",
        f"{case}, quintic",
        shape=text(shape),
        dtype=name(dtype),
        backend=ops.used().get("newton_schulz", "reference"),
        make=lambda: (torch.randn(shape, device=DEVICE).to(dtype),),
        call=lambda bank: ops.newton_schulz(bank, "quintic", STEPS),
        others={"parameter-golf": one_by_one(lambda matrix: theirs(matrix, steps=STEPS))},
        tolerance=5e-2,
        work=work(shape, dtype),
    )
