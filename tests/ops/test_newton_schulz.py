"""Newton-Schulz: singular values in their band, against the float64 iteration, banks, edges, hostile input.

The scheme of the Triton path (float16 inside, two steps on one Gram matrix) is tested here at shapes that the
interpreter is too slow for, on products of plain PyTorch with the same roundings; interpreted_newton_schulz.py holds
that the kernels give those.
"""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import NO_WORSE, relative_error

from pgolf import ops
from pgolf.ops.newton_schulz import (
    NORMALIZATIONS,
    flops,
    iterate,
    newton_schulz_reference,
    schedule,
    step_coefficients,
    tile_side,
)

normalized = importlib.import_module("pgolf.ops.newton_schulz")._normalized

RECORD_BANKS = [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)]
SHAPES = [(48, 48), (32, 96), (96, 32), (63, 100), (1, 9), (9, 1)]
BANDS = {"polar_express": (0.84, 1.13), "quintic": (0.46, 1.21)}  # after 5 steps, singular values >= 1e-3 of the norm


def with_singular_values(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    """A random (m, n) float64 matrix with these min(m, n) singular values."""
    u, _, v = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag(values.double()) @ v


def plain(x, polynomials):
    """The iteration as the docstring has it, on x (B, n, m), n <= m, in the dtype of x."""
    x = (x.double() / x.double().norm(dim=(-2, -1), keepdim=True)).to(x.dtype)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def symmetric_product(left, right, alpha=1.0, beta=0.0, plus=None, gamma=0.0, dtype=None):
    """What the kernel of that name computes."""
    sums = alpha * (left.float() @ right.float().mT) + gamma * torch.eye(left.shape[1])
    sums = sums if plus is None else sums + beta * plus.float()
    return (sums.tril() + sums.tril(-1).mT).to(dtype or left.dtype)


def product(left, right):
    return (left.float() @ right.float()).to(left.dtype)


def kernel_scheme(bank, polynomials, normalize="frobenius"):
    """A bfloat16 bank (B, M, N) as the Triton path has it."""
    dtype, segments = schedule(*bank.shape[1:], bank.dtype, polynomials)
    assert dtype == torch.float16
    x = normalized(bank.float(), normalize).to(dtype)
    return iterate(x, polynomials, segments, symmetric_product, wide_bits=True, product=product).to(bank.dtype)


def singular_values(bank):
    """(B, n), ascending, in float64; exact to 1e-8 of the largest."""
    bank = bank.double()
    gram = bank.mT @ bank if bank.shape[1] > bank.shape[2] else bank @ bank.mT
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def mapped(values: np.ndarray, polynomials) -> np.ndarray:
    """What the polynomials make of singular values."""
    for a, b, c in polynomials:
        values = a * values + b * values**3 + c * values**5
    return values


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    condition=st.floats(1, 100),
    name=st.sampled_from(["polar_express", "quintic"]),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
)
@settings(max_examples=60, deadline=None)
def test_singular_values_land_in_the_band(seed, m, n, condition, name, scale):
    torch.manual_seed(seed)
    matrix = with_singular_values(m, n, torch.logspace(0, -np.log10(condition), min(m, n))) * scale
    for dtype in (torch.float64, torch.float32):
        found = torch.linalg.svdvals(ops.newton_schulz(matrix.to(dtype), name).double())
        low, high = BANDS[name]
        assert found.min() > low
        assert found.max() < high


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("name", ["polar_express", "quintic"])
def test_each_step_is_the_documented_polynomial_of_the_singular_values(name, steps):
    values = torch.logspace(0, -6, 24)
    matrix = with_singular_values(24, 30, values)
    out = ops.newton_schulz(matrix, name, steps)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = mapped((values.double() / values.double().norm()).numpy(), step_coefficients(name, steps))
    np.testing.assert_allclose((u.mT @ out @ v.mT).diagonal().numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_against_float64_is_that_of_plain_products(dtype):
    for m, n in SHAPES[:4]:
        values = torch.logspace(0, -1, min(m, n))
        bank = torch.stack([with_singular_values(m, n, values) for _ in range(16)]).to(dtype)
        polynomials = step_coefficients("polar_express", 5)
        truth = ops.newton_schulz(bank.double())
        error = relative_error(ops.newton_schulz(bank), truth)
        wide = bank.mT if m > n else bank
        products = plain(wide, polynomials)
        plain_error = relative_error(products.mT if m > n else products, truth)
        # The steps enlarge rounding errors of small singular values: hence not the usual bounds (docstring).
        assert error < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        assert error <= NO_WORSE * plain_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_polynomials_without_one_of_their_terms(dtype):
    for m, n in SHAPES:
        bank = torch.randn(2, m, n).to(dtype)
        for polynomial in ((2.0, 0.0, 0.0), (2.0, 30.0, 0.0), (2.0, 0.0, 500.0), (0.0, 30.0, 0.0), (0.0, 0.0, 500.0)):
            truth = newton_schulz_reference(bank.double(), [polynomial])
            assert relative_error(newton_schulz_reference(bank, [polynomial]), truth) < 0.05, polynomial
        assert (newton_schulz_reference(bank, [(0.0, 0.0, 0.0)]) == 0).all()


# What momentum looks like: flat, one large direction, falling, or a small part that matters beside a large one.
SPECTRA = {
    "flat": lambda n: torch.ones(n),
    "one of 100": lambda n: torch.cat([torch.tensor([100.0]), torch.ones(n - 1)]),
    "1/sqrt(i)": lambda n: torch.arange(1, n + 1) ** -0.5,
    "1/i": lambda n: torch.arange(1, n + 1) ** -1.0,
    "1/i²": lambda n: torch.arange(1, n + 1) ** -2.0,
    "to 1e-1": lambda n: torch.logspace(0, -1, n),
    "to 1e-2": lambda n: torch.logspace(0, -2, n),
    "to 1e-3": lambda n: torch.logspace(0, -3, n),
    "to 1e-6": lambda n: torch.logspace(0, -6, n),
    "half at 0.01": lambda n: torch.cat([torch.ones(n // 2), torch.full((n - n // 2,), 0.01)]),
    "few of 50": lambda n: torch.cat([torch.full((n // 16,), 50.0), torch.ones(n - n // 16)]),
}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["polar_express", "quintic", "aol"])
def test_the_kernels_scheme_is_no_worse_than_plain_products_for_any_spectrum(name, normalize):
    polynomials = step_coefficients(name, 5)
    for m, n in ((64, 64), (32, 64), (64, 256), (256, 64)):
        for spectrum in SPECTRA.values():
            bank = torch.stack([with_singular_values(m, n, spectrum(min(m, n))) for _ in range(2)]).bfloat16()
            truth = newton_schulz_reference(bank.double(), polynomials, normalize)
            error = relative_error(kernel_scheme(bank, polynomials, normalize), truth)
            assert error <= NO_WORSE * relative_error(newton_schulz_reference(bank, polynomials, normalize), truth)


def test_no_worse_at_the_record_shapes():
    polynomials = step_coefficients("polar_express", 5)
    for _, m, n in RECORD_BANKS:
        bank = torch.randn(1, m, n).bfloat16()
        truth = ops.newton_schulz(bank.double())
        error = relative_error(kernel_scheme(bank, polynomials), truth)
        assert error <= NO_WORSE * relative_error(ops.newton_schulz(bank), truth)


def batches(condition, some, rest):
    """Banks of random matrices, or of that condition: `some` of each of the record's shapes, `rest` of a quarter."""
    for count, divisor in ((some, 1), (rest, 4)):
        for _, rows, columns in RECORD_BANKS[:3]:
            bank = torch.randn(count, rows // divisor, columns // divisor)
            if condition is not None:
                u, _, v = torch.linalg.svd(bank, full_matrices=False)
                bank = u * torch.logspace(0, -np.log10(condition), u.shape[2]) @ v
            yield bank.bfloat16()


@pytest.mark.parametrize(("condition", "some", "rest"), [(None, 2, 332), (1e6, 1, 33)], ids=["random", "ill"])
def test_every_singular_value_is_where_the_float64_iteration_has_it(condition, some, rest):
    """1,000 random matrices and 100 of condition 1e6: the scheme of the kernels one by one, the reference as a band.

    In plain bfloat16 single values were off by up to 0.05 (random) and 0.15 (ill-conditioned).
    """
    polynomials = step_coefficients("polar_express", 5)
    for bank in batches(condition, some, rest):
        values = singular_values(bank)
        expected = torch.from_numpy(mapped((values / values.norm(dim=1, keepdim=True)).numpy(), polynomials))
        found = singular_values(kernel_scheme(bank, polynomials))
        assert (found - expected.sort(dim=1).values).abs().max() < 0.02
        found = singular_values(ops.newton_schulz(bank))
        assert (found.amin(dim=1) > expected.amin(dim=1) - 0.1).all()
        assert (found.amax(dim=1) < expected.amax(dim=1) + 0.02).all()


@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 50, 20), (3, 30, 30)])
def test_normalisations(shape):
    bank = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -3, shape[1])[:, None]
    bank[0, 3] = 0
    frobenius, row, aol = (normalized(bank, how) for how in NORMALIZATIONS)
    torch.testing.assert_close(frobenius, bank / bank.norm(dim=(1, 2), keepdim=True))
    lengths = row.norm(dim=2)
    assert lengths[0, 3] == 0
    torch.testing.assert_close(lengths[1:], torch.full_like(lengths[1:], shape[1] ** -0.5))
    torch.testing.assert_close(lengths[0, :3], torch.full_like(lengths[0, :3], (shape[1] - 1) ** -0.5))
    x = bank.mT if shape[1] > shape[2] else bank
    scale = (x @ x.mT).abs().sum(dim=2, keepdim=True).clamp_min(1e-300).rsqrt()
    torch.testing.assert_close(aol.mT if shape[1] > shape[2] else aol, x * scale)
    for x in (frobenius, row, aol):
        assert singular_values(x).max() < 1 + 1e-9
    for how in NORMALIZATIONS:
        truth = ops.newton_schulz(bank, normalize=how)
        assert singular_values(truth).max() < 1.13
        torch.testing.assert_close(truth, ops.newton_schulz(bank * 1e30, normalize=how))
        assert relative_error(ops.newton_schulz(bank.float(), normalize=how), truth) < 1e-3


def test_four_steps_after_aol_do_what_five_do():
    for _, m, n in RECORD_BANKS:
        matrix = torch.randn(m // 4, n // 4, dtype=torch.float64)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        four = ops.newton_schulz(matrix, "aol", normalize="aol")
        assert relative_error(four, u @ v) < relative_error(ops.newton_schulz(matrix), u @ v)
        five = singular_values(normalized(matrix[None], "frobenius"))
        assert (singular_values(normalized(matrix[None], "aol")) > 2 * five).all()
    values = np.linspace(1e-2, 1, 10_000)
    assert mapped(values, step_coefficients("aol", 5)).min() > 0.97
    assert mapped(values, step_coefficients("aol", 5)).max() < 1.15


def test_the_dtype_and_the_steps_on_one_gram_matrix():
    polar, half = step_coefficients("polar_express", 5), torch.float16
    assert schedule(512, 2048, torch.bfloat16, polar) == (half, (1, 2, 2))
    assert schedule(512, 256, torch.bfloat16, polar) == (half, (1, 2, 2))
    assert schedule(512, 512, torch.bfloat16, polar) == (half, (1,) * 5)
    for dtype in (half, torch.float32, torch.float64):
        assert schedule(512, 2048, dtype, polar) == (dtype, (1,) * 5)
    assert schedule(512, 2048, torch.bfloat16, step_coefficients("aol", 5)) == (half, (2, 2))
    steep = ((30.0, 0.0, 0.0), (1.5, -0.5, 0.0))
    assert schedule(512, 2048, torch.bfloat16, steep) == (torch.bfloat16, (1, 1)), "30 is out of range"
    steep = ((7.0, -14.0, 7.0), (7.0, -3.5, 0.4375))
    assert schedule(512, 2048, torch.bfloat16, steep) == (half, (1, 1)), "a gain of 49 is too much for a pair"


def test_flops_of_the_record_are_at_most_62_percent_of_the_plain_chains():
    plainly = spent = 0
    for count, m, n in RECORD_BANKS:
        short, long = sorted((m, n))
        plainly += count * 5 * (4 * short * short * long + 2 * short**3)
        spent += count * flops(m, n, 5, count=count)
    assert spent <= 0.62 * plainly
    assert flops(512, 512, 1, dtype=torch.float16, count=22) == 2 * 512**3 * (1 + 2 * 10 / 16)
    assert flops(512, 2048) == flops(2048, 512)


def test_tiles_by_the_multiprocessors_that_they_occupy():
    half = torch.float16
    assert tile_side(22, 512, 512, half) == 128  # 220 large tiles
    assert tile_side(11, 512, 2048, half) == 128  # 110 of 132
    assert tile_side(11, 512, 512, half) == 64
    assert tile_side(3, 512, 2048, half) == 64
    assert tile_side(22, 256, 512, half) == 64
    assert tile_side(22, 512, 512, torch.float32) == 64


def test_banks_views_and_out():
    for m, n in SHAPES:
        bank = torch.randn(4, m, n, dtype=torch.float64)
        out = ops.newton_schulz(bank)
        assert out.shape == bank.shape
        for matrix, expected in zip(bank, out, strict=True):
            torch.testing.assert_close(ops.newton_schulz(matrix), expected)
        turned = ops.newton_schulz(bank.mT)
        torch.testing.assert_close(turned, out.mT)
        target = torch.full_like(bank, torch.nan)
        assert ops.newton_schulz(bank, out=target) is target
        assert torch.equal(target, out)
        ops.newton_schulz(bank, out=bank)
        assert torch.equal(bank, out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_edges(dtype):
    zero = torch.zeros(2, 5, 7, dtype=dtype)
    assert torch.equal(ops.newton_schulz(zero), zero)
    for shape in ((0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 4)):
        assert ops.newton_schulz(torch.empty(shape, dtype=dtype)).shape == shape

    one = torch.outer(torch.randn(9).double(), torch.randn(6).double()).to(dtype)
    singular = torch.linalg.svdvals(ops.newton_schulz(one).double())
    assert 0.84 < singular[0] < 1.13
    if dtype == torch.float64:
        assert singular[1:].max() < 1e-9

    bank = torch.randn(3, 5, 7).to(dtype)
    for bad in (torch.nan, torch.inf):
        broken = bank.clone()
        broken[1, 2, 3] = bad
        out = ops.newton_schulz(broken)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], ops.newton_schulz(bank)[[0, 2]])

    tiny, huge = torch.finfo(dtype).tiny * 4, torch.finfo(dtype).max / 8
    unit = ops.newton_schulz(torch.sign(bank))
    for scale in (tiny, huge):
        assert torch.equal(ops.newton_schulz(torch.sign(bank) * scale), unit)


def test_the_given_bank_is_not_changed_and_lists_rule():
    bank = torch.randn(2, 4, 6)
    before = bank.clone()
    listed = ops.newton_schulz(bank, [(2.0, -1.5, 0.5), [1.875, -1.25, 0.375]])
    assert torch.equal(bank, before)
    torch.testing.assert_close(listed, newton_schulz_reference(bank, ((2.0, -1.5, 0.5), (1.875, -1.25, 0.375))))
    assert len(step_coefficients([(1, 0, 0)] * 3, steps=5)) == 3
    assert step_coefficients("polar_express", 9)[-2:] == ((1.875, -1.25, 0.375),) * 2


def test_one_graph():
    compiled = torch.compile(ops.newton_schulz, fullgraph=True, backend="aot_eager")
    for shape in ((2, 5, 7), (7, 5)):
        bank = torch.randn(shape)
        torch.testing.assert_close(compiled(bank), ops.newton_schulz(bank))
    out = torch.empty(7, 5)
    compiled(bank, "quintic", 3, out=out)
    torch.testing.assert_close(out, ops.newton_schulz(bank, "quintic", 3))
    compiled(bank, "aol", normalize="aol", out=bank)
    assert not torch.equal(bank, out)


def test_registered_operation():
    polynomials = [number for triple in step_coefficients("polar_express", 5) for number in triple]
    for bank in (torch.randn(2, 5, 7), torch.randn(7, 5).t(), torch.randn(0, 4), torch.randn(3, 4).double()):
        for normalize in NORMALIZATIONS:
            torch.library.opcheck(torch.ops.pgolf.newton_schulz, (bank, polynomials, normalize, "reference"))
            out = torch.empty_like(bank)
            arguments = (out, bank, polynomials, normalize, "reference")
            torch.library.opcheck(torch.ops.pgolf.newton_schulz_into, arguments)
            assert ops.newton_schulz(bank, normalize=normalize).is_contiguous()


BANK = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.zeros(3),), {}, ValueError, r"bank: shape \(3,\)"),
        ((BANK.int(),), {}, TypeError, "bank: dtype torch.int32"),
        ((BANK, "cubic"), {}, ValueError, "coefficients: 'cubic' .* polar_express, quintic"),
        ((BANK, []), {}, ValueError, "coefficients: an empty list"),
        ((BANK, [(1, 2)]), {}, ValueError, r"coefficients\[0\]: \(1, 2\)"),
        ((BANK, [(1, 2, 3), (1, 2, float("nan"))]), {}, ValueError, r"coefficients\[1\]: nan"),
        ((BANK, [(1, 2, "3")]), {}, ValueError, r"coefficients\[0\]: '3'"),
        ((BANK, 5), {}, TypeError, "coefficients: expected a name or a list"),
        ((BANK, "quintic", 0), {}, ValueError, "steps: 0"),
        ((BANK, "quintic", 2.5), {}, TypeError, "steps: expected an int, got float"),
        ((BANK,), {"normalize": "spectral"}, ValueError, "normalize: 'spectral'"),
        ((BANK,), {"out": torch.zeros(2, 4, 3)}, ValueError, "out: shape"),
        ((BANK,), {"out": BANK.half()}, TypeError, "out: dtype"),
        ((BANK,), {"out": BANK.to("meta")}, ValueError, "out: on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.newton_schulz(*arguments, **keywords)
