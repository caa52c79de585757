"""GPTQ's native code: each value right given those before it, and the definition's loss.

Sums are taken in another order than the definition's, so a value may differ where the number that is rounded lies
within a rounding error of a tie, and what follows in its row may then differ by anything. What is held is that each
value is right given those before it, that rows without a near tie are equal, and that the loss is.
"""

import numpy as np
import pytest
import torch
from numerics import need
from test_gptq import REAL, definition, loss, random_hessian, to_nearest

from pgolf import ops
from pgolf.ops import backends

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
