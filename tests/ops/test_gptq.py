"""GPTQ: against a textbook elimination in float64, its loss, banks, edges, and real matrices where they are at hand."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import need

from pgolf import ops
from pgolf.ops import backends
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


# The native code. Sums are taken in another order than the definition's, so a value may differ where the number that
# is rounded lies within a rounding error of a tie, and what follows in its row may then differ by anything. What is
# held is that each value is right given those before it, that rows without a near tie are equal, and that the loss
# is.

NEAR_A_TIE = 1e-4  # in units of the scale
STRIP = 32


@pytest.fixture
def native():
    need("gptq", "native")
    module = backends.native()
    level, threads = module.level(), torch.get_num_threads()
    yield module
    module.set_level(level)
    torch.set_num_threads(threads)


def in_strips(factor: torch.Tensor) -> torch.Tensor:
    """A factor (N, N) as csrc/gptq/gptq.h stores it."""
    n = len(factor)
    whole = torch.eye(n + -n % STRIP)
    whole[:n, :n] = factor
    return torch.cat([whole[r : r + STRIP, : r + STRIP].mT.flatten() for r in range(0, len(whole), STRIP)])


def out_of_strips(strips: torch.Tensor, n: int) -> torch.Tensor:
    factor, at = torch.zeros(n + -n % STRIP, n + -n % STRIP), 0
    for r in range(0, len(factor), STRIP):
        size = STRIP * (r + STRIP)
        factor[r : r + STRIP, : r + STRIP] = strips[at : at + size].reshape(r + STRIP, STRIP).mT
        at += size
    return factor[:n, :n].tril()


def distance_from_right(weight, values, scale, factor, limit):
    """How far each value (M, N) is from what it should be given those before it, less half a step; and from a tie."""
    error = (weight.double() - scale.double().unsqueeze(1) * values.double()) @ factor.double()
    error /= scale.double().unsqueeze(1)
    clamped = ((values == limit) & (error > 0)) | ((values == -limit) & (error < 0))
    return torch.where(clamped, 0.0, error.abs() - 0.5), (error.abs() - 0.5).abs()


def round_natively(native, weight, factor, scale, limit, threads=1):
    n = weight.shape[1]
    values, order = torch.full(weight.shape, 99, dtype=torch.int8), torch.arange(n)
    strips, scale = in_strips(factor), scale.float()
    pointers = (tensor.data_ptr() for tensor in (weight, order, strips, scale, values))
    native.round_columns(*pointers, 1, len(weight), n, limit, threads)
    return values


@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (63, 100), (32, 32), (33, 31), (96, 257)])
def test_the_same_factor_gives_the_same_values(native, shape, bits):
    weight, limit = torch.randn(shape), 2 ** (bits - 1) - 1
    hessian = random_hessian(shape[1], torch.float32, 0.5)
    scale = definition.row_scale(weight.unsqueeze(0), 3.0, limit)[0]
    order = definition._order(hessian.unsqueeze(0), False)
    factor = definition._factor(hessian.unsqueeze(0), order, 0.01)[0]
    columns = weight.mT.contiguous().unsqueeze(0)
    expected = definition.round_columns(columns, factor.unsqueeze(0), scale.float().unsqueeze(0), limit, 128)[0].mT
    _, from_a_tie = distance_from_right(weight, expected, scale, factor, limit)
    clear = (from_a_tie > NEAR_A_TIE).all(dim=1)
    assert clear.float().mean() > 0.5
    for level in native.levels():
        native.set_level(level)
        values = round_natively(native, weight, factor, scale, limit)
        assert torch.equal(values[clear].float(), expected[clear])
        beyond, _ = distance_from_right(weight, values, scale, factor, limit)
        assert beyond.max() < NEAR_A_TIE


@pytest.mark.parametrize("n", [1, 7, 31, 32, 33, 100, 320])
def test_the_factor(native, n):
    hessian = torch.stack([random_hessian(n, torch.float32) for _ in range(3)])
    order = torch.stack([torch.randperm(n) for _ in range(3)])
    diagonal = hessian.diagonal(dim1=1, dim2=2) * 1.01
    hessian[1, 0, 0] = torch.nan  # is not read: the diagonal comes apart
    for level in native.levels():
        native.set_level(level)
        for threads in (1, 2, 4):
            factors = torch.full((3, native.factor_size(n)), torch.nan)
            pointers = (tensor.data_ptr() for tensor in (hessian, order, diagonal))
            hessian_at, *others = pointers
            failed = native.factor_hessians(hessian_at, 3, n, *others, [0, 1, 2], factors.data_ptr(), threads)
            assert failed == []
            if threads == 1:
                alone = factors
            assert torch.equal(factors.nan_to_num(7), alone.nan_to_num(7))
        for h, its_order, its_diagonal, strips in zip(hessian.double(), order, diagonal.double(), factors, strict=True):
            h.diagonal().copy_(its_diagonal)
            h = h[its_order][:, its_order]
            lower = torch.linalg.cholesky(h)
            factor = out_of_strips(strips, n).double()
            torch.testing.assert_close(factor.diagonal(), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-6)
            rebuilt = (factor * lower.diagonal().square()) @ factor.mT
            assert ((rebuilt - h).norm() / h.norm()).item() < 2e-6


def test_a_factor_that_cannot_be(native):
    for n in (3, 40):
        good = random_hessian(n, torch.float32)
        for bad_value in (50 * good.diagonal().max(), torch.nan, torch.inf):
            bad = good.clone()
            bad[n - 1, n - 2] = bad[n - 2, n - 1] = bad_value
            bank, order = torch.stack([good, bad, good, bad]), torch.arange(n).repeat(4, 1)
            diagonal, factors = bank.diagonal(dim1=1, dim2=2).contiguous(), torch.empty(4, native.factor_size(n))
            others = (order.data_ptr(), diagonal.data_ptr(), [0, 1, 3], factors.data_ptr())
            assert native.factor_hessians(bank.data_ptr(), 4, n, *others, 2) == [1, 3]


def test_flaws_are_those_that_pytorch_finds(native):
    for n in (1, 31, 32, 70):
        bank = torch.stack([random_hessian(n, torch.float32) for _ in range(6)])
        bank[1, n - 1, n // 2] = torch.nan
        bank[2, 0, n - 1] = -torch.inf
        bank[3, n // 2, n // 2] = -1e-3
        bank[4, n - 1, 0] += 2e-3 * bank[4].abs().max()
        bank[5, n - 1, 0] += 5e-4 * bank[5].abs().max()
        found, expected = native.check_hessians(bank.data_ptr(), 6, n, 1e-3, 2), definition.flaws_of(bank)
        assert [flaws & 3 if flaws & 1 else flaws for flaws in found] == [
            flaws & 3 if flaws & 1 else flaws for flaws in expected
        ]
        assert found[0] == 0
        assert all(found[1:4])


def test_threads_blocks_levels_and_neighbours_change_nothing(native):
    for count, rows, n in ((1, 1, 1), (1, 70, 63), (3, 40, 100), (1, 33, 320)):
        bank = torch.randn(count, rows, n)
        hessians = torch.stack([random_hessian(n, torch.float32, 0.5) for _ in range(count)])
        torch.set_num_threads(1)
        values, scale = ops.gptq(bank, hessians, 6, clip_sigmas=4.0)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(ops.gptq(bank, hessians, 6, clip_sigmas=4.0)[0], values)
        for block_size in (1, 7, 300):
            assert torch.equal(ops.gptq(bank, hessians, 6, clip_sigmas=4.0, block_size=block_size)[0], values)
        for i in range(count):
            alone, alone_scale = ops.gptq(bank[i], hessians[i], 6, clip_sigmas=4.0)
            assert torch.equal(alone, values[i])
            assert torch.equal(alone_scale, scale[i])
        found = {}
        for level in native.levels():
            native.set_level(level)
            found[level] = ops.gptq(bank, hessians, 6, clip_sigmas=4.0)[0]
            assert loss(bank, found[level], scale, hessians) == pytest.approx(
                loss(bank, values, scale, hessians), rel=0.01
            )
        assert all(torch.equal(found[level], values) for level in native.levels()[1:]), "fused from avx2 on"


def test_one_hessian_for_a_bank(native):
    bank, hessian = torch.randn(3, 20, 50), random_hessian(50, torch.float32)
    values, scale = ops.gptq(bank, hessian, 6)
    apart, its_scale = ops.gptq(bank, hessian.expand(3, 50, 50), 6)
    assert torch.equal(values, apart)
    assert torch.equal(scale, its_scale)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_rank_deficient_and_dead_as_the_definition_says(native, damping):
    bank, x = torch.randn(2, 40, 60), torch.randn(2, 20, 60)
    x[0, :, [3, 59]] = 0
    hessians = x.mT @ x  # of rank 20: without damping neither factors
    values, scale = ops.gptq(bank, hessians, 6, damping=damping)
    with ops.backend("reference"):
        expected, its_scale = ops.gptq(bank, hessians, 6, damping=damping)
    assert torch.equal(scale, its_scale)
    assert torch.equal(values[0, :, [3, 59]].double(), to_nearest(bank[0], scale[0], 6)[:, [3, 59]])
    damped = hessians + 1e-3 * torch.eye(60) * hessians.diagonal(dim1=1, dim2=2).mean()
    assert loss(bank, values, scale, damped) == pytest.approx(loss(bank, expected, its_scale, damped), rel=0.05)


@pytest.mark.parametrize("shape", [(128, 128), (64, 300), (3, 64, 128)])
def test_the_loss_is_the_definitions(native, shape):
    weight = torch.randn(shape)
    hessian = torch.stack([random_hessian(shape[-1], torch.float32, 1.0) for _ in range(len(weight))])
    hessian = hessian if weight.ndim == 3 else hessian[0]
    values, scale = ops.gptq(weight, hessian, 6)
    with ops.backend("reference"):
        expected, its_scale = ops.gptq(weight, hessian, 6)
    assert torch.equal(scale, its_scale)
    assert loss(weight, values, scale, hessian) == pytest.approx(loss(weight, expected, scale, hessian), rel=1e-3)
    assert (values != expected).float().mean() < 0.02


@pytest.mark.skipif(not REAL.is_dir(), reason="no real weights in ../shared/data/weights")
@pytest.mark.parametrize("name", ["mlp.fc", "mlp.proj", "attn.proj", "attn.c_q", "attn.c_k", "attn.c_v"])
def test_real_matrices_lose_what_the_definition_loses(native, name):
    weight = torch.from_numpy(np.load(REAL / f"W_blocks.3.{name}.npy"))
    hessian = torch.from_numpy(np.load(REAL / f"H_blocks.3.{name}.npy"))
    values, scale = ops.gptq(weight, hessian, 6)
    with ops.backend("reference"):
        expected, _ = ops.gptq(weight, hessian, 6)
    assert loss(weight, values, scale, hessian) == pytest.approx(loss(weight, expected, scale, hessian), rel=1e-3)
    assert (values != expected).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block_size", [1, 7, 128, 300])
def test_on_the_gpu(block_size):
    need("gptq", "native", "cuda")
    for count, rows, n in ((1, 1, 1), (2, 63, 100), (3, 200, 320), (1, 65, 16)):
        bank = torch.randn(count, rows, n)
        hessians = torch.stack([random_hessian(n, torch.float32, 0.5) for _ in range(count)])
        hessians[0, n // 2] = hessians[0, :, n // 2] = 0
        order = definition._order(hessians, True)
        factor = definition._factor(hessians, order, 0.01)
        values, scale = ops.gptq(bank.cuda(), hessians.cuda(), 6, clip_sigmas=4.0, block_size=block_size)
        assert ops.used()["gptq"] == "native"
        values, scale = values.cpu(), scale.cpu()
        with ops.backend("reference"):
            expected, its_scale = ops.gptq(bank, hessians, 6, clip_sigmas=4.0)
        torch.testing.assert_close(scale, its_scale, rtol=1e-3, atol=0)
        assert loss(bank, values, scale, hessians) == pytest.approx(
            loss(bank, expected, its_scale, hessians), rel=0.02, abs=1e-6
        )
        for i in range(count):
            beyond, _ = distance_from_right(bank[i][:, order[i]], values[i][:, order[i]], scale[i], factor[i], 31)
            assert beyond.max() < 1e-3, "each value is right given those before it"
