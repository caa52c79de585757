"""Orthogonalising the record's banks: each alone, all of them, and one rank's eighth.

Beside a loop over the matrices, on CUDA the plain products compiled, and the challenge baseline's function.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.harness.measure import Call, Work
from bench.harness.shapes import SHAPES, name, text
from bench.peers import peer
from pgolf import ops
from pgolf.ops.newton_schulz import newton_schulz_reference, step_coefficients

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STEPS = 5

Shape = tuple[int, int, int]
UP = SHAPES.banks["up"]
BANKS: dict[str, Shape] = {**SHAPES.banks, "down": (UP[0], UP[2], UP[1])}


def eighth(case: str) -> Shape:
    """What one rank of eight has of a bank: it takes a matrix more of "up" than of "down"."""
    count, rows, columns = BANKS[case]
    return max(1, count // 8 if case == "down" else -(-count // 8)), rows, columns


CASES: dict[str, tuple[Shape, ...]] = {
    **{case: (shape,) for case, shape in BANKS.items()},
    "all banks": tuple(BANKS.values()),
    "one rank's eighth": tuple(eighth(case) for case in BANKS),
}


def of_all(function: Callable[[Tensor], Tensor]) -> Call:
    return lambda *banks: tuple(function(bank) for bank in banks)


def one_by_one(function: Callable[[Tensor], Tensor]) -> Call:
    return of_all(lambda bank: torch.stack([function(matrix) for matrix in bank]))


def plain(bank: Tensor) -> Tensor:
    return newton_schulz_reference(bank, step_coefficients("polar_express", STEPS))


def random_banks(case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in CASES[case])


def work(case: str, dtype: torch.dtype) -> Work:
    """The plain chain's FLOPs (4n²m + 2n³ a step), with no use of symmetry."""
    elements = flops = 0
    for count, rows, columns in CASES[case]:
        n, m = sorted((rows, columns))
        elements += count * n * m
        flops += STEPS * count * (4 * n * n * m + 2 * n**3)
    return Work(bytes=2 * elements * dtype.itemsize, flops=flops)


def shapes(case: str) -> str:
    return " + ".join(text(shape) for shape in CASES[case])


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_newton_schulz(measure, case, dtype):
    ops.newton_schulz(random_banks(case, dtype)[0])
    others = {"one by one": one_by_one(lambda matrix: ops.newton_schulz(matrix, steps=STEPS))}
    if CUDA:
        others |= {"plain": of_all(plain), "torch.compile": of_all(torch.compile(plain, dynamic=False))}
    measure(
        "newton_schulz",
        case,
        shape=shapes(case),
        dtype=name(dtype),
        backend=ops.used()["newton_schulz"],
        make=lambda: random_banks(case, dtype),
        call=of_all(lambda bank: ops.newton_schulz(bank, steps=STEPS)),
        others=others,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        work=work(case, dtype),
    )


@pytest.mark.parametrize("case", CASES)
def test_newton_schulz_quintic_beside_the_challenge_baseline(measure, case):
    function = peer("parameter_golf").zeropower_via_newtonschulz5
    theirs = torch.compile(function, dynamic=False) if CUDA else function
    dtype = torch.bfloat16
    measure(
        "newton_schulz",
        f"{case}, quintic",
        shape=shapes(case),
        dtype=name(dtype),
        backend=ops.used().get("newton_schulz", "reference"),
        make=lambda: random_banks(case, dtype),
        call=of_all(lambda bank: ops.newton_schulz(bank, "quintic", STEPS)),
        others={"parameter-golf": one_by_one(lambda matrix: theirs(matrix, steps=STEPS))},
        tolerance=5e-2,
        work=work(case, dtype),
    )
