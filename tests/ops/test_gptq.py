"""GPTQ: against a textbook elimination in float64, its loss, banks, edges, and real matrices where they are at hand."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import ops
from pgolf.ops.gptq import SMALLEST_SCALE

definition = importlib.import_module("pgolf.ops.gptq")

REAL = Path(__file__).parents[3] / "shared" / "data" / "weights"


def random_hessian(n: int, dtype=torch.float64, skew: float = 0.0) -> torch.Tensor:
    """Second moments of correlated inputs; `skew` spreads the scales of the columns over e^±skew."""
    x = torch.randn(4 * n, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    x = x + torch.randn(4 * n, 1, dtype=torch.float64) * n**0.5
    x = x * torch.exp(skew * torch.randn(n, dtype=torch.float64))
    return (x.mT @ x / (4 * n)).to(dtype)


def loss(weight, values, scale, hessian) -> float:
    """tr((W - Q) H (W - Q)ᵀ) in float64."""
    difference = weight.double() - values.double() * scale.double().unsqueeze(-1)
    return ((difference @ hessian.double()) * difference).sum().item()


def to_nearest(weight, scale, bits):
    limit = 2 ** (bits - 1) - 1
    return torch.round(weight.double() / scale.double().unsqueeze(-1)).clamp(-limit, limit)


def eliminate(weight, hessian, scale, bits, damping, act_order):
    """Round column by column, taking each out of the inverse Hessian by elimination: no Cholesky, no blocks."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    s, limit, n = scale.double().numpy(), 2 ** (bits - 1) - 1, w.shape[1]
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(n))
    values = np.zeros_like(w)
    for j in order:
        values[:, j] = np.clip(np.round(w[:, j] / s), -limit, limit)
        error = (w[:, j] - s * values[:, j]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(values)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_equals_the_textbook_elimination(bits, act_order):
    for m, n, block in ((7, 30, 8), (16, 16, 128), (1, 5, 1), (20, 33, 32)):
        weight, hessian = torch.randn(m, n, dtype=torch.float64), random_hessian(n)
        values, scale = ops.gptq(weight, hessian, bits, clip_sigmas=3.0, act_order=act_order, block_size=block)
        assert values.dtype == torch.int8
        assert scale.dtype == torch.float16
        limit = 2 ** (bits - 1) - 1
        assert torch.equal(scale, (3.0 * weight.std(dim=1) / limit).half())
        assert values.abs().max() <= limit
        assert torch.equal(values.double(), eliminate(weight, hessian, scale, bits, 0.01, act_order))


def test_float32_loses_nothing():
    weight, hessian = torch.randn(64, 96), random_hessian(96, torch.float32)
    values, scale = ops.gptq(weight, hessian, 6)
    exact_values, exact_scale = ops.gptq(weight.double(), hessian, 6)
    torch.testing.assert_close(scale, exact_scale, rtol=1e-3, atol=0)
    found, exact = loss(weight, values, scale, hessian), loss(weight, exact_values, exact_scale, hessian)
    assert found == pytest.approx(exact, rel=0.02)
    low, low_scale = ops.gptq(weight.bfloat16(), hessian, 6)
    assert loss(weight.bfloat16(), low, low_scale, hessian) == pytest.approx(exact, rel=0.1)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(8, 24),
    columns=st.integers(16, 48),
    bits=st.integers(3, 8),
    skew=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_loss_is_below_rounding_to_nearest(seed, rows, columns, bits, skew):
    torch.manual_seed(seed)
    weight, hessian = torch.randn(rows, columns), random_hessian(columns, torch.float32, skew)
    values, scale = ops.gptq(weight, hessian, bits, clip_sigmas=4.0 if bits < 6 else 12.85)
    assert loss(weight, values, scale, hessian) <= loss(weight, to_nearest(weight, scale, bits), scale, hessian)


def test_it_serves_the_hessian_it_is_given():
    weight = torch.randn(32, 40)
    one, other = random_hessian(40), random_hessian(40)
    for_one, scale = ops.gptq(weight, one, 5)
    for_other, same_scale = ops.gptq(weight, other, 5)
    assert torch.equal(scale, same_scale)
    assert loss(weight, for_one, scale, one) < 0.9 * loss(weight, for_other, scale, one)
    assert loss(weight, for_other, scale, other) < 0.9 * loss(weight, for_one, scale, other)
    plain, _ = ops.gptq(weight, torch.eye(40), 5)
    assert torch.equal(plain.double(), to_nearest(weight, scale, 5)), "nothing is correlated: round to nearest"


def test_act_order_helps_where_columns_differ():
    ordered = unordered = 0.0
    for _ in range(5):
        weight, hessian = torch.randn(48, 64), random_hessian(64, skew=1.5)
        for act_order in (True, False):
            values, scale = ops.gptq(weight, hessian, 6, act_order=act_order)
            found = loss(weight, values, scale, hessian)
            ordered, unordered = ordered + found * act_order, unordered + found * (not act_order)
    assert ordered < 0.9 * unordered


def test_a_bank_gives_what_its_matrices_give():
    bank = torch.randn(5, 12, 20, dtype=torch.float64)
    hessians = torch.stack([random_hessian(20) for _ in range(5)])
    hessians[3, 7] = hessians[3, :, 7] = 0  # a dead column
    x = torch.randn(6, 20, dtype=torch.float64)
    hessians[4] = x.mT @ x  # of rank 6: this one needs more damping than asked for
    values, scale = ops.gptq(bank, hessians, 6, damping=0.0, block_size=7)
    assert values.shape == bank.shape
    assert scale.shape == (5, 12)
    assert values.is_contiguous()
    for matrix, hessian, mine, my_scale in zip(bank, hessians, values, scale, strict=True):
        alone, alone_scale = ops.gptq(matrix, hessian, 6, damping=0.0, block_size=7)
        assert torch.equal(mine, alone)
        assert torch.equal(my_scale, alone_scale)
    shared, _ = ops.gptq(bank, hessians[0], 6)
    assert torch.equal(shared[2], ops.gptq(bank[2], hessians[0], 6)[0])


def test_dead_columns_are_rounded_to_nearest():
    weight, hessian = torch.randn(9, 12, dtype=torch.float64), random_hessian(12)
    dead = [0, 5]
    hessian[dead] = 0
    hessian[:, dead] = 0
    values, scale = ops.gptq(weight, hessian, 6)
    assert torch.equal(values[:, dead].double(), to_nearest(weight, scale, 6)[:, dead])
    alive = [j for j in range(12) if j not in dead]
    expected = eliminate(weight[:, alive], hessian[alive][:, alive], scale, 6, 0.01, True)
    assert torch.equal(values[:, alive].double(), expected)
    nothing, scale = ops.gptq(weight, torch.zeros(12, 12), 6)
    assert torch.equal(nothing.double(), to_nearest(weight, scale, 6))


def test_rows_without_variance():
    weight = torch.randn(5, 8)
    weight[1] = 0
    weight[2] = -0.75
    weight[3] *= 1e-12
    values, scale = ops.gptq(weight, torch.eye(8), 6)
    assert (values[1] == 0).all()
    assert (values[2] == -31).all()
    assert scale[2].item() == pytest.approx(0.75 / 31, rel=1e-3)
    assert scale[1] == scale[3] == SMALLEST_SCALE
    one_column, scale = ops.gptq(torch.tensor([[0.5], [-2.0]]), torch.ones(1, 1), 4)
    assert one_column.tolist() == [[7], [-7]]


def test_a_hessian_that_no_damping_mends():
    good = random_hessian(6)
    bad = good.clone()
    bad[0, 1] = bad[1, 0] = 50 * good.diagonal().max()
    with pytest.raises(ValueError, match="hessian: matrix 2 is not positive definite"):
        ops.gptq(torch.randn(4, 3, 6), torch.stack([good, good, bad, good]), 6)


@pytest.mark.parametrize("quantize", [ops.gptq, definition.gptq_reference])
def test_a_hessian_of_any_size_serves(quantize):
    weight, hessian = torch.randn(3, 9, 20), torch.stack([random_hessian(20, torch.float32) for _ in range(3)])
    wanted, scale = quantize(weight, hessian, 6)
    sizes = torch.tensor([2.0**70, 2.0**-70, 1.0]).reshape(3, 1, 1)
    found, its_scale = quantize(weight, hessian * sizes, 6)
    assert torch.equal(found, wanted)
    assert torch.equal(its_scale, scale)
    largest, _ = quantize(weight, hessian / hessian.abs().amax(dim=(1, 2), keepdim=True) * 3e38, 6)
    assert (largest != wanted).float().mean() < 0.05  # by another rounding of the Hessian
    nearly_nothing, _ = quantize(weight, hessian * 1e-41, 6)
    assert nearly_nothing.int().abs().max() <= 31


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 5), (2, 0, 5)])
def test_empty_input(shape):
    hessian = torch.eye(shape[-1])
    values, scale = ops.gptq(torch.empty(shape), hessian, 6)
    assert values.shape == shape
    assert values.dtype == torch.int8
    assert scale.shape == shape[:-1]
    assert scale.dtype == torch.float16


def test_inputs_are_not_changed_and_may_be_views():
    weight, hessian = torch.randn(6, 8), random_hessian(8, torch.float32)
    kept = weight.clone(), hessian.clone()
    values, scale = ops.gptq(weight.requires_grad_(), hessian, 6)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert not values.requires_grad
    assert not scale.requires_grad
    turned, _ = ops.gptq(weight.t().contiguous().t(), hessian.t(), 6)
    assert (turned != values).float().mean() < 0.05  # other rounding errors, the same matrix


def broken(value, *places):
    tensor = torch.eye(4)
    for place in places:
        tensor[place] = value
    return tensor


W, H = torch.ones(3, 4), torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((W, broken(torch.nan, (1, 1)), 6), {}, ValueError, "hessian: matrix 0 holds NaN or infinity"),
        ((broken(torch.inf, (2, 1)), H, 6), {}, ValueError, "weight: matrix 0 holds NaN or infinity"),
        ((W, broken(-1.0, (2, 2)), 6), {}, ValueError, "hessian: matrix 0 has a negative number on its diagonal"),
        ((W, broken(0.5, (0, 1)), 6), {}, ValueError, "hessian: matrix 0 is not symmetric"),
        ((torch.randn(3, 4) * 1e8, H, 2), {}, ValueError, "weight: a row of matrix 0 needs a scale above 65504"),
        ((W, torch.eye(3), 6), {}, ValueError, r"hessian: shape \(3, 3\), expected \(4, 4\)"),
        ((W, torch.stack([H, H]), 6), {}, ValueError, r"hessian: shape \(2, 4, 4\)"),
        ((torch.ones(2, 3, 4), torch.stack([H] * 3), 6), {}, ValueError, r"expected \(2, 4, 4\)"),
        ((torch.ones(4), H, 6), {}, ValueError, r"weight: shape \(4,\)"),
        ((W.int(), H, 6), {}, TypeError, "weight: dtype torch.int32"),
        ((W, H.long(), 6), {}, TypeError, "hessian: dtype torch.int64"),
        ((W, H.to("meta"), 6), {}, ValueError, "hessian: on meta"),
        ((W, H, 1), {}, ValueError, "bits: 1 .* 2 to 8"),
        ((W, H, 9), {}, ValueError, "bits: 9"),
        ((W, H, 6), {"clip_sigmas": 0}, ValueError, "clip_sigmas: 0"),
        ((W, H, 6), {"clip_sigmas": "12"}, TypeError, "clip_sigmas: expected a float"),
        ((W, H, 6), {"damping": -0.1}, ValueError, "damping: -0.1"),
        ((W, H, 6), {"damping": 2.0}, ValueError, "damping: 2.0"),
        ((W, H, 6), {"block_size": 0}, ValueError, "block_size: 0"),
        ((W, H, 6), {"act_order": "yes"}, TypeError, "act_order: expected a bool"),
    ],
)
def test_wrong_arguments_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.gptq(*arguments, **keywords)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real weights in ../shared/data/weights")
@pytest.mark.parametrize(
    ("name", "published"),
    [("mlp.fc", 26817), ("mlp.proj", 22368), ("attn.proj", 5985.9), ("attn.c_q", 4710.1)],
)
def test_real_matrices_reach_the_loss_of_the_records_code(name, published):
    weight = torch.from_numpy(np.load(REAL / f"W_blocks.3.{name}.npy"))
    hessian = torch.from_numpy(np.load(REAL / f"H_blocks.3.{name}.npy"))
    values, scale = ops.gptq(weight, hessian, 6)
    assert loss(weight, values, scale, hessian) == pytest.approx(published, rel=1e-3)
