"""The Triton kernels of newton_schulz under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import importlib
from collections import Counter

import pytest
import test_newton_schulz as plainly
import torch
from numerics import NO_WORSE, TOLERANCE, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf import ops
from pgolf.ops.newton_schulz import NORMALIZATIONS, flops, schedule, step_coefficients
from pgolf.triton_kernels import newton_schulz as kernels

operation = importlib.import_module("pgolf.ops.newton_schulz")
POLAR = step_coefficients("polar_express", 5)
SHAPES = [(3, 63, 100), (1, 33, 65), (3, 65, 33), (48, 48), (1, 130, 50), (2, 70, 90)]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_against_float64(dtype, normalize):
    outs, truths, references = [], [], []
    for shape in SHAPES:
        bank = torch.randn(shape).to(dtype)
        with ops.backend("triton"):
            out = ops.newton_schulz(bank, normalize=normalize)
        assert out.dtype == dtype
        assert out.shape == bank.shape
        assert out.is_contiguous()
        outs.append(out.flatten())
        truths.append(ops.newton_schulz(bank.double(), normalize=normalize).flatten())
        references.append(ops.newton_schulz(bank, normalize=normalize).flatten())
    error, reference = (relative_error(torch.cat(found), torch.cat(truths)) for found in (outs, references))
    assert error < {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}[dtype]  # small singular values too
    assert error <= NO_WORSE * reference
    if dtype == torch.bfloat16:
        assert error < 0.6 * reference, "iterated in float16"


@pytest.mark.parametrize("name", ["quintic", "aol", [(30.0, 0.0, 0.0)], [(2.0, -1.5, 0.5)] * 3])
def test_other_polynomials(name):
    bank = torch.randn(2, 30, 66).half()
    with ops.backend("triton"):
        out = ops.newton_schulz(bank, name, 3)
    truth = ops.newton_schulz(bank.double(), name, 3)
    assert relative_error(out, truth) <= NO_WORSE * relative_error(ops.newton_schulz(bank, name, 3), truth)


def test_the_kernels_compute_the_scheme_that_is_tested_at_the_record_shapes():
    for shape in ((3, 63, 100), (2, 40, 130), (2, 130, 40)):
        x = kernels.normalized(torch.randn(shape).bfloat16(), torch.float16, "frobenius")
        _, segments = schedule(*shape[1:], torch.bfloat16, POLAR)
        out = operation.iterate(x, POLAR, segments, kernels.symmetric_product, wide_bits=True)
        expected = operation.iterate(
            x, POLAR, segments, plainly.symmetric_product, wide_bits=True, product=plainly.product
        )
        # Up to single bits, which the steps enlarge with all other rounding errors.
        assert relative_error(out, expected.double()) < 1e-2


def test_zero_nan_rank_one_and_scale():
    with ops.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            plainly.test_edges(dtype)
        for normalize in NORMALIZATIONS:
            bank = torch.randn(3, 20, 45).bfloat16()
            good = ops.newton_schulz(bank, normalize=normalize)
            for bad in (torch.nan, torch.inf):
                broken = bank.clone()
                broken[1, 2, 3] = bad
                out = ops.newton_schulz(broken, normalize=normalize)
                assert out[1].isnan().all()
                assert torch.equal(out[[0, 2]], good[[0, 2]])
            bank[1] = 0
            bank[2, 4] = 0
            out = ops.newton_schulz(bank, normalize=normalize)
            assert (out[1] == 0).all()
            assert (out[2, 4] == 0).all()
            assert torch.equal(out[0], good[0])
            assert torch.equal(ops.newton_schulz(bank * 2**20, normalize=normalize), out)


def test_strides_and_unaligned_memory():
    bank = torch.randn(2, 21, 50)
    shifted = torch.empty(bank.numel() + 1)[1:].view(bank.shape).copy_(bank)
    turned = bank.mT.contiguous().mT
    sliced = torch.cat((bank, bank), dim=2)[:, :, :50]
    out = torch.empty(2, 50, 21).mT
    with ops.backend("triton"):
        expected = ops.newton_schulz(bank)
        for case in (shifted, turned, sliced):
            assert torch.equal(ops.newton_schulz(case), expected)
        torch.testing.assert_close(ops.newton_schulz(bank.mT), expected.mT, rtol=1e-4, atol=1e-5)
        assert torch.equal(ops.newton_schulz(bank[:1].expand(3, -1, -1))[2], expected[0])
        ops.newton_schulz(bank, out=out)
        assert torch.equal(out, expected)
        ops.newton_schulz(bank, out=bank)
        assert torch.equal(bank, expected)


def test_rows_of_very_different_size():
    bank = torch.randn(2, 24, 60).bfloat16() * torch.logspace(0, -7, 24).bfloat16()[:, None]
    for normalize in ("row", "aol"):
        truth = ops.newton_schulz(bank.double(), normalize=normalize)
        with ops.backend("triton"):
            assert relative_error(ops.newton_schulz(bank, normalize=normalize), truth) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "inner"), [(1, 1), (63, 100), (64, 64), (65, 33), (130, 70), (200, 40), (257, 16)])
@pytest.mark.usefixtures("poisoned")
def test_symmetric_products(size, inner, dtype):
    x = torch.randn(2, size, inner).to(dtype)
    square = torch.randn(2, size, size).to(dtype)
    plus = square + square.mT
    other = torch.randn(size, size).to(dtype)
    tall = x.mT.contiguous()
    cases = [
        (x, x, {}),
        (tall.mT, tall.mT, {"alpha": 0.5}),
        (x, x, {"alpha": -1.5, "beta": 0.25, "plus": plus, "gamma": 3.0}),
        (x, x, {"dtype": torch.float32}),
        (other.expand(2, -1, -1), other[None].expand(2, -1, -1), {"beta": 2.0, "plus": plus}),
    ]
    for left, right, rest in cases:
        out = kernels.symmetric_product(left, right, **rest)
        assert torch.equal(out, out.mT)
        assert out.dtype == rest.get("dtype", dtype)
        truth = rest.get("alpha", 1.0) * left.double() @ right.double().mT + rest.get("gamma", 0.0) * torch.eye(size)
        if "plus" in rest:
            truth += rest["beta"] * plus.double()
        assert relative_error(out, truth) < TOLERANCE[dtype]


def test_only_one_triangle_counts():
    """Of operands whose product is not symmetric the lower triangle is taken, whatever the number of tiles."""
    for size in (10, 64, 100, 130, 250):
        left, right = torch.randn(2, 3, size, 24)
        expected = (left @ right.mT).tril()
        expected = expected + expected.tril(-1).mT
        torch.testing.assert_close(kernels.symmetric_product(left, right), expected, rtol=1e-4, atol=1e-4)


PAIRS = {"bmm": 1, "baddbmm": 2, "mul": 2, "add": 2}  # one step by itself, then two pairs


class Launches(TorchDispatchMode):
    """Counts what PyTorch would launch."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("transpose", "slice", "alias", "new_empty"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "dtype", "normalize", "products", "others"),
    [
        ((2, 16, 16), torch.bfloat16, "frobenius", 10, {"bmm": 5}),
        ((2, 16, 32), torch.bfloat16, "frobenius", 14, PAIRS),
        ((2, 40, 16), torch.bfloat16, "row", 14, PAIRS),
        ((22, 512, 512), torch.bfloat16, "row", 10, {"bmm": 5}),
        ((2, 16, 32), torch.float16, "frobenius", 10, {"baddbmm": 5}),
        ((2, 16, 30), torch.float32, "frobenius", 10, {"baddbmm": 5}),
        (
            (2, 32, 16),
            torch.bfloat16,
            "aol",
            15,
            PAIRS | {"linalg_vector_norm": 1, "clamp_min": 1, "rsqrt": 1, "mul_": 1},
        ),
    ],
)
def test_launches_are_as_documented_and_flops_as_counted(monkeypatch, shape, dtype, normalize, products, others):
    tiles = []

    def symmetric_product(left, right, tile, dtype=None, **rest):
        count, size, inner = left.shape
        side = -(-size // tile)
        tiles.append(count * side * (side + 1) // 2 * tile * tile * inner)
        return left.new_empty(count, size, size, dtype=dtype)

    def normalized(bank, dtype, how):
        return bank.new_empty(len(bank), *(-(-side // 8) * 8 for side in bank.shape[1:]), dtype=dtype)

    monkeypatch.setattr(kernels, "symmetric_product", symmetric_product)
    monkeypatch.setattr(kernels, "normalized", normalized)
    with Launches() as launches:
        operation._by_kernels(torch.empty(shape, dtype=dtype, device="meta"), POLAR, normalize)
    launches.found -= Counter(empty=1)
    assert len(tiles) == products
    assert launches.found == others
    if normalize != "aol" and shape[2] % 8 == 0:
        count, n, m = shape[0], *sorted(shape[1:])
        large = (others.get("bmm", 0) + others.get("baddbmm", 0)) * count * n * n * m
        assert 2 * (sum(tiles) + large) == count * flops(n, m, 5, dtype=dtype, count=count)


def test_the_tiles_that_are_chosen_exist():
    assert [launch.block for launch in kernels.LAUNCHES[90, 2]] == [operation.LARGE_TILE, operation.SMALL_TILE]
    assert [launch.block for launch in kernels.LAUNCHES[90, 4]] == [operation.SMALL_TILE]


def test_registered_operation():
    polynomials = [number for triple in POLAR[:2] for number in triple]
    for normalize in NORMALIZATIONS:
        bank = torch.randn(9, 16).bfloat16().t()
        torch.library.opcheck(torch.ops.pgolf.newton_schulz, (bank, polynomials, normalize, "triton"))
    for bank in (torch.randn(2, 5, 7), torch.randn(0, 4), torch.randn(3, 4).half()):
        torch.library.opcheck(torch.ops.pgolf.newton_schulz, (bank, polynomials, "row", "triton"))
    arguments = (torch.empty(3, 6), torch.randn(3, 6), polynomials, "row", "triton")
    torch.library.opcheck(torch.ops.pgolf.newton_schulz_into, arguments)


def test_one_graph():
    compiled = torch.compile(ops.newton_schulz, fullgraph=True, backend="aot_eager")
    bank = torch.randn(2, 5, 12).bfloat16()
    with ops.backend("triton"):
        torch.testing.assert_close(compiled(bank), ops.newton_schulz(bank))
    assert ops.used()["newton_schulz"] == "triton"
