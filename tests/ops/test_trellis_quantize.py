"""Trellis quantisation: definition and native code, what it gains on GPTQ, its decoder, threads and levels, edges."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import ops
from pgolf.ops import backends
from pgolf.ops.trellis_dequantize import (
    NEXT,
    QUANTIZER,
    quantizers_of,
    trellis_dequantize_reference,
)
from pgolf.ops.trellis_quantize import _search, _search_native, trellis_quantize_reference

REAL = Path(__file__).parents[3] / "shared" / "data" / "weights"

native = pytest.mark.skipif(
    not backends._native_cpu().ok, reason="pgolf._native is not built here; pip install -e . builds it"
)


@pytest.fixture
def level():
    """level(name) sets the code path; the test leaves the one that it found."""
    module = backends.native()
    before = module.level()
    yield module.set_level
    module.set_level(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_hessian(n: int, skew: float = 0.5) -> torch.Tensor:
    x = torch.randn(2 * n, n) @ (torch.eye(n) + torch.randn(n, n) / n**0.5)
    x = x * torch.exp(skew * torch.randn(n))
    return x.mT @ x / (2 * n)


def loss(weight, approximation, hessian) -> float:
    """tr((W - Q) H (W - Q)ᵀ) in float64."""
    difference = weight.double() - approximation.double()
    return ((difference @ hessian.double()) * difference).sum().item()


def gptq_loss_and_entropy(weight, hessian, bits=6):
    values, scale = ops.gptq(weight, hessian, bits)
    share = torch.bincount(values.reshape(-1).long() + 128).double() / values.numel()
    entropy = -torch.special.xlogy(share, share).sum().item() / np.log(2)
    return loss(weight, values * scale.float().unsqueeze(-1), hessian), entropy


def decode_by_description(indices, scale, order, states):
    """One weight after another, from the words of the docstring."""
    weights = np.zeros(indices.shape, dtype=np.float32)
    columns = sorted(range(len(order)), key=lambda j: order[j])  # stable
    for r, row in enumerate(indices):
        state = 0
        for j in columns:
            k = int(row[j])
            quantizer = state & 1 if states == 8 else state >> 1
            level = 2 * k - quantizer * ((k > 0) - (k < 0))
            weights[r, j] = np.float32(level) * np.float32(scale[r])
            state = NEXT[states][state][k % 2]
    return weights


@pytest.mark.parametrize("states", [4, 8])
def test_decoder(states, poisoned):
    for m, n in ((1, 1), (3, 40), (7, 129)):
        indices = torch.randint(-128, 128, (2, m, n), dtype=torch.int8)
        scale, order = torch.rand(2, m).half(), torch.randint(0, 4, (2, n), dtype=torch.int8)
        found = ops.trellis_dequantize(indices, scale, order, states)
        assert found.dtype == torch.float32
        assert torch.equal(found, trellis_dequantize_reference(indices, scale, order, states))
        for matrix, s, its, one in zip(indices, scale, order, found, strict=True):
            assert np.array_equal(one.numpy(), decode_by_description(matrix.numpy(), s.numpy(), its.tolist(), states))
            assert torch.equal(one, ops.trellis_dequantize(matrix, s, its, states))
        turned = ops.trellis_dequantize(indices.mT.contiguous().mT, scale, order, states)
        assert torch.equal(turned, found)


def test_decoder_is_an_operation_of_torch():
    arguments = (torch.randint(-9, 9, (5, 12), dtype=torch.int8), torch.rand(5), torch.zeros(12, dtype=torch.int8), 8)
    torch.library.opcheck(torch.ops.pgolf.trellis_dequantize.default, arguments)


def test_every_state_has_one_arrival_of_each_parity():
    for states, following in NEXT.items():
        for parity in (0, 1):
            assert sorted(each[parity] for each in following) == list(range(states))
        assert sum(QUANTIZER[states]) == states // 2


@native
@pytest.mark.parametrize("states", [4, 8])
def test_native_equals_the_definition(states):
    for m, n, bits in ((33, 70, 6), (5, 31, 3), (18, 97, 8), (16, 32, 2), (1, 1, 6), (40, 3, 5)):
        weight, hessian = torch.randn(m, n), random_hessian(n)
        found = ops.trellis_quantize(weight, hessian, 4.0, bits, states)
        wanted = trellis_quantize_reference(weight, hessian, 4.0, bits, states)
        assert ops.used()["trellis_quantize"] == "native"
        assert (found.indices != wanted.indices).float().mean() <= 0.05  # a tie can turn the rest of its row
        assert loss(weight, found.dequantize(), hessian) == pytest.approx(
            loss(weight, wanted.dequantize(), hessian), rel=0.02
        )
        assert torch.equal(found.order, wanted.order)
        assert torch.equal(found.scale, wanted.scale)
        assert found.indices.abs().max() <= 2 ** (bits - 1) - 1


def cost_of(indices, target, factor, rate, weight, states, limit):
    """What the path of `indices` costs, in float64, and the quantisers that it meets."""
    residual = target.double().clone()
    state = torch.zeros(len(target), dtype=torch.long)
    total = torch.zeros(len(target), dtype=torch.float64)
    for j in range(target.shape[1]):
        k = indices[:, j].long()
        quantizer = torch.tensor(QUANTIZER[states])[state]
        error = (residual[:, j] - (2 * k - quantizer * k.sign())) / factor[j, j].double()
        total += error.square() + weight.double() * rate.double()[quantizer, k + limit]
        residual[:, j + 1 :] -= error.unsqueeze(1) * factor[j, j + 1 :].double()
        state = torch.tensor(NEXT[states])[state, k & 1]
    return total


@native
@pytest.mark.parametrize("states", [4, 8])
def test_the_path_is_as_cheap_as_the_definition_s(states):
    """Also where survivors never meet: free zeros keep each state on a way of its own."""
    n, limit = 150, 7
    factor = torch.eye(n) + torch.randn(n, n).triu(1) * 0.05
    target = torch.randn(21, n) * 4
    target[3:9, 20:] = 0
    target[9] = 1e5
    target[10] = -1e-30
    rate, weight = torch.rand(2, 2 * limit + 1) * 4, torch.rand(21)
    weight[2:6] = 0
    arguments = (target, factor, rate, weight, states, limit)
    costs = [cost_of(search(*arguments), *arguments) for search in (_search_native, _search)]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-5, atol=1e-4)


@native
@pytest.mark.parametrize("states", [4, 8])
def test_threads_and_levels_change_nothing(states, level):
    target, factor = torch.randn(70, 200) * 5, torch.eye(200) + torch.randn(200, 200).triu(1) * 0.05
    rate, weight = torch.rand(2, 63) * 6, torch.full((70,), 0.3)
    before = torch.get_num_threads()
    found = []
    try:
        for name in backends.native().levels():
            level(name)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(_search_native(target, factor, rate, weight, states, 31))
        alone = [_search_native(target[i : i + 1], factor, rate, weight[:1], states, 31) for i in (0, 17, 69)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(torch.cat(alone), found[0][[0, 17, 69]])


def gain(weight, hessian, states):
    """Loss over that of GPTQ at no more bits, the order's included: a smaller step while there are bits left."""
    theirs, entropy = gptq_loss_and_entropy(weight, hessian)
    least = None
    for clip in (6.4, 6.3, 6.2):
        found = ops.trellis_quantize(weight, hessian, clip, states=states)
        if found.entropy_bits + 2 / weight.shape[0] > entropy:
            break
        least = loss(weight, found.dequantize(), hessian)
    return least / theirs


@native
def test_gain_on_random_matrices(one_thread):
    weight, hessian = torch.randn(512, 512), random_hessian(512)
    assert gain(weight, hessian, 8) <= 0.83
    assert gain(weight, hessian, 4) <= 0.86


@native
@pytest.mark.skipif(not REAL.is_dir(), reason="no real weights in ../shared/data/weights")
@pytest.mark.parametrize("name", ["mlp.fc", "mlp.proj", "attn.proj", "attn.c_q"])
def test_gain_on_real_matrices(name, one_thread):
    weight = torch.from_numpy(np.load(REAL / f"W_blocks.3.{name}.npy"))
    hessian = torch.from_numpy(np.load(REAL / f"H_blocks.3.{name}.npy"))
    assert gain(weight, hessian, 8) <= 0.83


def test_entropy_is_that_of_the_index_given_its_quantiser():
    found = ops.trellis_quantize(torch.randn(20, 30), random_hessian(30), 4.0)
    quantizer = quantizers_of(found.indices, found.order, 8)
    bits = 0.0
    for which in (0, 1):
        _, counts = found.indices[quantizer == which].unique(return_counts=True)
        bits -= (counts * torch.log2(counts / counts.sum())).sum().item()
    assert found.entropy_bits == pytest.approx(bits / 600)


def test_rate_weight_trades_loss_for_bits():
    weight, hessian = torch.randn(64, 64), random_hessian(64)
    free, dear = (ops.trellis_quantize(weight, hessian, 6.4, rate_weight=each) for each in (0.0, 2.0))
    assert free.entropy_bits > dear.entropy_bits + 0.05
    assert loss(weight, free.dequantize(), hessian) < loss(weight, dear.dequantize(), hessian)


def test_a_bank_and_a_shared_hessian():
    bank, hessians = torch.randn(3, 9, 20), torch.stack([random_hessian(20) for _ in range(3)])
    hessians[1, 4] = hessians[1, :, 4] = 0  # a dead column
    found = ops.trellis_quantize(bank, hessians, rate_weight=0.0)
    assert found.indices.shape == bank.shape
    assert found.scale.shape == (3, 9)
    assert found.order.shape == (3, 20)
    for i in range(3):
        alone = ops.trellis_quantize(bank[i], hessians[i], rate_weight=0.0)
        assert torch.equal(alone.indices, found.indices[i])
        assert torch.equal(alone.dequantize(), found.dequantize()[i])
    shared = ops.trellis_quantize(bank, hessians[0])
    assert torch.equal(shared.order, shared.order[:1].expand(3, 20))
    assert (bank - shared.dequantize()).abs().max() < 2


def test_edges():
    weight = torch.randn(6, 40)
    weight[1], weight[2] = 0, 0.75
    weight[3] *= 1e-12
    found = ops.trellis_quantize(weight, random_hessian(40))
    assert not found.dequantize()[1].any()
    assert (found.dequantize()[2] - 0.75).abs().mean() < 0.1
    assert found.dequantize().isfinite().all()
    dead = ops.trellis_quantize(weight, torch.zeros(40, 40))
    assert (dead.dequantize() - weight)[0].abs().max() < 1
    one = ops.trellis_quantize(torch.tensor([[0.5], [-2.0]]), torch.ones(1, 1), bits=4)
    assert (one.dequantize() - torch.tensor([[0.5], [-2.0]])).abs().max() < 0.3
    for shape in ((0, 5), (3, 0), (0, 4, 5), (2, 0, 5)):
        nothing = ops.trellis_quantize(torch.empty(shape), torch.eye(shape[-1]))
        assert nothing.indices.shape == nothing.dequantize().shape == shape
        assert nothing.entropy_bits == 0


@pytest.mark.parametrize("quantize", [ops.trellis_quantize, trellis_quantize_reference])
@pytest.mark.parametrize("size", [1e36, 2.0**50, 2.0**-50, 1e-41])
def test_a_hessian_of_any_size_serves(quantize, size):
    weight, hessian = torch.randn(17, 40), random_hessian(40)
    found = quantize(weight, hessian * (1e38 / hessian.max() if size == 1e36 else size))
    if size == 1e-41:  # its numbers are whole multiples of 2^-149
        assert found.indices.int().abs().max() <= 31
    elif size == 1e36:
        assert (found.dequantize() - weight).abs().mean() < 0.5
    else:
        wanted = quantize(weight, hessian)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.order, wanted.order)


@native
def test_the_search_stays_in_bounds_whatever_it_is_given(level):
    """Infinity and NaN in any place, at every level and in the definition: indices all the same within the limit."""
    for bad in (torch.inf, -torch.inf, torch.nan, 3e38):
        for place in range(4):
            target, factor = torch.randn(18, 40), torch.randn(40, 40).triu() / 8 + torch.eye(40)
            given = (target, factor, torch.rand(2, 63), torch.rand(18))
            spoilt = given[place].view(-1)
            spoilt[torch.randint(len(spoilt), (3,))] = bad
            found = []
            for name in backends.native().levels():
                level(name)
                found.append(_search_native(*given, 8, 31))
            if factor.isfinite().all():  # else zeros times infinity, which differ in number, turn to NaN
                assert all(torch.equal(each, found[0]) for each in found), (bad, place)
            assert max(int(each.int().abs().max()) for each in (*found, _search(*given, 8, 31))) <= 31


W, H = torch.ones(3, 4), torch.eye(4)
K = torch.zeros(3, 4, dtype=torch.int8)
ORDER = torch.zeros(4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"states": 6}, ValueError, "states: 6"),
        ({"states": 8.0}, TypeError, "states: expected an int"),
        ({"rate_weight": -1.0}, ValueError, "rate_weight: -1"),
        ({"rate_weight": float("nan")}, ValueError, "rate_weight: nan"),
        ({"rate_weight": "1"}, TypeError, "rate_weight: expected a float"),
        ({"clip_sigmas": 0.0}, ValueError, "clip_sigmas: 0"),
        ({"bits": 9}, ValueError, "bits: 9"),
        ({"weight": torch.full((3, 4), torch.nan)}, ValueError, "weight: matrix 0 holds NaN or infinity"),
        ({"hessian": torch.full((4, 4), torch.inf)}, ValueError, "hessian: matrix 0 holds NaN or infinity"),
        ({"rate_weight": 1e300}, ValueError, "rate_weight: 1e.300 is too large for float32"),
        ({"hessian": torch.eye(3)}, ValueError, "hessian: shape"),
        ({"weight": W.int()}, TypeError, "weight: dtype"),
    ],
)
def test_wrong_arguments_are_named(keywords, error, message):
    with pytest.raises(error, match=message):
        ops.trellis_quantize(**{"weight": W, "hessian": H, **keywords})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((K.int(), torch.ones(3), ORDER, 8), TypeError, "indices: dtype"),
        ((K[0], torch.ones(3), ORDER, 8), ValueError, "indices: shape"),
        ((K, torch.ones(4), ORDER, 8), ValueError, "scale: shape"),
        ((K, torch.ones(3), ORDER[:3], 8), ValueError, "order: shape"),
        ((K, torch.ones(3), ORDER.int(), 8), TypeError, "order: dtype"),
        ((K, torch.ones(3), ORDER + 4, 8), ValueError, "order: 4 .* 0 to 3"),
        ((K, torch.ones(3), ORDER - 1, 8), ValueError, "order: -1"),
        ((K, torch.ones(3), ORDER, 2), ValueError, "states: 2"),
    ],
)
def test_wrong_arguments_of_the_decoder_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.trellis_dequantize(*arguments)


@native
def test_what_float32_does_not_hold_is_named():
    tiny = torch.eye(4, dtype=torch.float64)
    tiny[1, 1] = 1e-200
    with pytest.raises(ValueError, match="hessian: matrix 0 inverted, for want of damping, is more than float32 holds"):
        ops.trellis_quantize(W, tiny, damping=0.0)
    with pytest.raises(ValueError, match="weight: matrix 0 divided by its steps is more than float32 holds"):
        ops.trellis_quantize(torch.randn(3, 4).double() * 1e60, H, clip_sigmas=1e-60)


@native
def test_native_arguments_are_checked():
    module = backends.native()
    for arguments in ((0, 0, 0, 0, 0, 1, 1, 8, 31), (1, 1, 1, 1, 1, 1, 1, 5, 31), (1, 1, 1, 1, 1, 1, 1, 8, 128)):
        with pytest.raises(ValueError, match="accepted is"):
            module.trellis_search(*arguments)
    with pytest.raises(ValueError, match="states is 5"):
        module.trellis_dequantize(1, 1, 1, 1, 1, 1, 1, 5)
