"""Newton-Schulz: singular values in their band, against the float64 iteration, banks, edges, hostile input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import NO_WORSE, relative_error

from pgolf import ops
from pgolf.ops.newton_schulz import newton_schulz_reference, step_coefficients

SHAPES = [(48, 48), (32, 96), (96, 32), (63, 100), (1, 9), (9, 1)]
BANDS = {"polar_express": (0.84, 1.13), "quintic": (0.46, 1.21)}  # after 5 steps, singular values >= 1e-3 of the norm


def with_singular_values(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    """A random (m, n) float64 matrix with these min(m, n) singular values."""
    u, _, v = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag(values.double()) @ v


def iterate(x, polynomials):
    """The iteration as the docstring has it, on x (B, n, m), n <= m, in the dtype of x."""
    x = (x.double() / x.double().norm(dim=(-2, -1), keepdim=True)).to(x.dtype)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


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
        plain = iterate(wide, polynomials)
        plain_error = relative_error(plain.mT if m > n else plain, truth)
        # The steps enlarge rounding errors of small singular values: hence not the usual bounds (docstring).
        assert error < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        assert error <= NO_WORSE * plain_error


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
