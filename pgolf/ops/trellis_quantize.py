"""Trellis quantisation: two interleaved quantisers, a state machine that picks one for each weight, and a search.

Order of the columns. The machine takes columns with a large diag H first, but the decoder does not know H. So `order`
gives each column a class 0..3, its quartile of diag H in descending order, and the machine takes the columns by class
and, in a class, as they come: 2 bits a column. The full order, at log2 N bits, has 2% more loss on two of the three
real matrices that were tried and 1% less on the third; no order at all 1% to 5% more.

Search, for each row, in units of its s. H⁻¹ = Uᵀ U as for GPTQ, U scaled so that the mean of 1/U_jj² is 1. A survivor
for each state has its own residuals x, at first W_r / s. At column j it tries the nearest index k and k ± 1 of its
quantiser, at the cost

    e² + λ_r · bits[quantiser][k],    e = (x_j - value) / U_jj,    λ_r = rate_weight · 2 ln 2 · 0.8/3 · mean(s²) / s_r²

keeps for each parity the cheaper one (inner before outer), and each state keeps its cheaper arrival (even before odd),
whose residuals then are x_t - e U_jt. In the end the cheapest path wins, the lowest state before others. `bits` is
-log2 of how often each index is the nearest one in all of `weight`, under each quantiser. (To count in a search without
rates and search twice more costs three times as much and, on the same matrices at equal entropy, 1.5% more loss.)

Cost a matrix: 2/3 N³ FLOPs to factor and solve, M N² + 96 · states · M N to search (native). The native search is for
the CPU and works in float32; the definition works in float64 if weight or hessian does. Indices agree except where two
paths cost the same within rounding.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pgolf.ops import backends
from pgolf.ops.gptq import (
    _check,
    flaws_of,
    of_ordinary_size,
    refuse,
    refuse_flaws,
    row_scale,
    with_enough_damping,
    work_dtype,
)
from pgolf.ops.trellis_dequantize import NEXT, QUANTIZER, check_states, quantizers_of, trellis_dequantize

CLASSES = 4  # of columns, in the order of the machine

backends.register("trellis_quantize", native=("cpu",))


@dataclass(frozen=True, eq=False)
class Trellis:
    """A quantised matrix or bank, as `trellis_quantize` returns it; the weights are worth `dequantize()`.

    Attributes:
        indices: int8 (M, N) or (B, M, N).
        scale: float16 (M,) or (B, M).
        order: int8 (N,) or (B, N), the class of each column, 0..3.
        states: of the machine, 4 or 8.
        entropy_bits: bits a weight of the index given its quantiser, by the frequencies in all of indices; neither
            order nor scale counts.
    Raises:
        TypeError, ValueError: `dequantize` as `trellis_dequantize`; nothing is checked before.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> found = ops.trellis_quantize(torch.randn(8, 16), torch.eye(16))
        >>> found.dequantize().shape, 0 < found.entropy_bits < 6
        (torch.Size([8, 16]), True)

    Source: dependent quantisation, as in video coding (ITU-T H.266).
    """

    indices: Tensor  # int8, like the weight
    scale: Tensor  # float16, (M,) or (B, M)
    order: Tensor  # int8, (N,) or (B, N): the class of each column, 0..3
    states: int

    @cached_property
    def entropy_bits(self) -> float:
        """Bits a weight of the index given its quantiser, by the frequencies in all of indices; no order, no scale."""
        return _entropy(self.indices, quantizers_of(self.indices, self.order, self.states))

    def dequantize(self) -> Tensor:
        """The weights in float32, (M, N) or (B, M, N)."""
        return trellis_dequantize(self.indices, self.scale, self.order, self.states)


def trellis_quantize(
    weight: Tensor,
    hessian: Tensor,
    clip_sigmas: float = 6.4,
    bits: int = 6,
    states: int = 8,
    rate_weight: float = 1.0,
    damping: float = 0.01,
) -> Trellis:
    """Quantise a matrix or a bank so that tr((W - Q) H (W - Q)ᵀ) and the indices' entropy are small.

    Loss and row scale s = clip_sigmas · std(W_r) / qmax, qmax = 2^(bits-1) - 1, are those of `gptq`; an index k, |k| <=
    qmax, is worth

        quantiser 0: 2k · s        quantiser 1: (2k - sgn k) · s

    and the quantiser follows from a machine of 4 or 8 states: a state has a quantiser, and the parity of the index
    leads to the next state. Every row starts in state 0. So a step of 2s is coded, of which the path chooses the better
    half, and nothing is sent but indices and an order of the columns: clip_sigmas near 6.4 takes the bits that GPTQ
    takes at 12.85.

        8 states: quantiser = state & 1; next states for even, odd k: (0,2) (5,7) (1,3) (6,4) (2,0) (4,6) (3,1) (7,5)
        4 states: quantiser = state >> 1;                             (0,2) (2,0) (1,3) (3,1)

    Edges: as for `gptq`, but a dead column is rounded by the path, and a row without variance is not exact. Not
    differentiable.

    Args:
        weight: (M, N) or (B, M, N), floating.
        hessian: (N, N), or (B, N, N) for a bank, or (N, N) shared by a bank; floating, symmetric.
        clip_sigmas: the step in standard deviations of the row, times 2^(bits-1) - 1; > 0.
        bits: 2 to 8; indices lie in -(2^(bits-1)-1)..2^(bits-1)-1.
        states: 4 or 8.
        rate_weight: 0 looks at the loss alone; 1 weighs bits as the loss that they are worth at this step.
        damping: added to the diagonal, in units of its mean, 0 to 1.
    Returns:
        A `Trellis`: indices int8 like weight, scale float16 (M,) or (B, M), order int8 (N,) or (B, N).
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device or number that does not fit, and whatever `gptq` refuses.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> weight, x = torch.randn(8, 16), torch.randn(100, 16)
        >>> found = ops.trellis_quantize(weight, x.mT @ x)
        >>> found.indices.shape, found.scale.shape, found.order.shape, found.states
        (torch.Size([8, 16]), torch.Size([8]), torch.Size([16]), 8)

    Sources: dependent quantisation, as in video coding (ITU-T H.266); GPTQ, Frantar et al., arXiv 2210.17323.
    """
    _check_arguments(weight, hessian, clip_sigmas, bits, states, rate_weight, damping)
    native = backends.choose("trellis_quantize", weight.device.type) == "native"
    return _quantize(weight, hessian, clip_sigmas, bits, states, rate_weight, damping, native)


def trellis_quantize_reference(
    weight: Tensor,
    hessian: Tensor,
    clip_sigmas: float = 6.4,
    bits: int = 6,
    states: int = 8,
    rate_weight: float = 1.0,
    damping: float = 0.01,
) -> Trellis:
    """The definition in plain PyTorch; arguments as for `trellis_quantize`."""
    return _quantize(weight, hessian, clip_sigmas, bits, states, rate_weight, damping, native=False)


@torch.no_grad()
def _quantize(
    weight: Tensor,
    hessian: Tensor,
    clip_sigmas: float,
    bits: int,
    states: int,
    rate_weight: float,
    damping: float,
    native: bool,
) -> Trellis:
    dtype = work_dtype(weight, hessian)
    order = torch.zeros(*weight.shape[:-2], weight.shape[-1], dtype=torch.int8, device=weight.device)
    if weight.numel() == 0:
        empty = torch.zeros_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        return Trellis(empty, weight.new_zeros(weight.shape[:-1], dtype=torch.float16), order, states)
    bank = weight.to(dtype).reshape(-1, *weight.shape[-2:])  # (B, M, N)
    count, _, columns = bank.shape
    h = hessian.to(dtype).reshape(-1, columns, columns)
    limit = 2 ** (bits - 1) - 1
    scale = row_scale(bank, clip_sigmas, limit)  # (B, M) float16
    refuse_flaws(flaws_of(h))
    h = of_ordinary_size(h).expand(count, columns, columns)
    step = scale.to(dtype)
    targets = bank / step.unsqueeze(-1)
    searched = torch.float32 if native else dtype
    _refuse_infinite(targets.to(searched), "weight", "divided by its steps")
    rate = _rates(targets, limit)

    ranks = h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    classes = ranks * CLASSES // columns  # (B, N)
    taken = classes.argsort(dim=-1, stable=True)
    rows_taken, columns_taken = taken.unsqueeze(2).expand_as(h), taken.unsqueeze(1).expand_as(h)
    factor = _inverse_factor(h.gather(1, rows_taken).gather(2, columns_taken), damping)
    factor = factor * factor.diagonal(dim1=-2, dim2=-1).pow(-2).mean(dim=-1).sqrt().reshape(-1, 1, 1)
    _refuse_infinite(factor.to(searched), "hessian", "inverted, for want of damping,")
    lagrangian = rate_weight * 2 * math.log(2) * 0.8 / 3 * step.square().mean(dim=-1, keepdim=True) / step.square()
    if not lagrangian.to(searched).isfinite().all():
        raise ValueError(f"rate_weight: {rate_weight} is too large for {str(searched).removeprefix('torch.')}")

    indices = torch.empty(bank.shape, dtype=torch.int8, device=bank.device)
    for i in range(count):
        search = _search_native if native else _search
        indices[i][:, taken[i]] = search(targets[i][:, taken[i]], factor[i], rate, lagrangian[i], states, limit)
    indices, order = indices.reshape(weight.shape), classes.to(torch.int8).reshape(order.shape)
    return Trellis(indices, scale.reshape(weight.shape[:-1]), order, states)


def _refuse_infinite(tensor: Tensor, name: str, how: str) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    refuse(~tensor.isfinite().flatten(1).all(dim=1), name, f"{how} is more than {dtype} holds")


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U (B, N, N), upper triangular, with (hessian + damping)⁻¹ = Uᵀ U for each matrix."""
    damped, lower = hessian.clone(), torch.empty_like(hessian)

    def attempt(diagonal: Tensor, which: list[int]) -> list[int]:
        damped.diagonal(dim1=-2, dim2=-1)[which] = diagonal[which]
        lower[which], failed = torch.linalg.cholesky_ex(damped[which].flip(-2, -1))
        return [which[i] for i in failed.nonzero().flatten().tolist()]

    with_enough_damping(hessian.diagonal(dim1=-2, dim2=-1), damping, attempt)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)


def _search_native(target: Tensor, factor: Tensor, rate: Tensor, weight: Tensor, states: int, limit: int) -> Tensor:
    target, factor, rate, weight = (each.float().contiguous() for each in (target, factor, rate, weight))
    indices = torch.empty(target.shape, dtype=torch.int8)
    addresses = (each.data_ptr() for each in (target, factor, rate, weight, indices))
    backends.native().trellis_search(*addresses, *target.shape, states, limit, threads=torch.get_num_threads())
    return indices


def _search(target: Tensor, factor: Tensor, rate: Tensor, weight: Tensor, states: int, limit: int) -> Tensor:
    """Indices int8 (M, N) of the cheapest paths.

    target (M, N) in steps, factor (N, N), rate (2, 2·limit + 1), weight (M,): what a bit costs.
    """
    rows, columns = target.shape
    device, shape = target.device, (rows, states)
    quantizer = torch.tensor(QUANTIZER[states], device=device).expand(shape)
    arrivals = [[0] * states, [0] * states]  # by parity: the state whose index of that parity leads here
    for state, following in enumerate(NEXT[states]):
        for parity in (0, 1):
            arrivals[parity][following[parity]] = state
    from_even, from_odd = (torch.tensor(each, device=device).expand(shape) for each in arrivals)
    rate = torch.nn.functional.pad(rate.to(target.dtype), (1, 1))
    residual = target.unsqueeze(1).repeat(1, states, 1)  # (M, S, N)
    cost = target.new_full(shape, math.inf)
    cost[:, 0] = 0
    chosen = torch.empty(columns, *shape, dtype=torch.int8, device=device)
    parents = torch.empty(columns, *shape, dtype=torch.int64, device=device)
    for j in range(columns):
        x = residual[:, :, j]
        sign = torch.where(x < 0, -1, 1)
        nearest = ((x.abs() + quantizer) * 0.5).nan_to_num(limit).clamp_max(limit).round().long()
        tried = []
        for size in (nearest - 1, nearest, nearest + 1):
            value = 2 * size - quantizer * size.sign()
            error = (x.abs() - value) * (1 / factor[j, j])
            bits = rate[quantizer, sign * size + limit + 1]
            price = cost + (error.square() + weight.unsqueeze(1) * bits)
            tried.append((torch.where(size > limit, math.inf, price), sign * error, sign * size))
        inner, middle, outer = tried
        other = _cheaper(inner, outer)
        odd = nearest % 2 == 1
        to_even = [torch.where(odd, one, two).gather(1, from_even) for one, two in zip(other, middle, strict=True)]
        to_odd = [torch.where(odd, two, one).gather(1, from_odd) for one, two in zip(other, middle, strict=True)]
        parent = torch.where(to_odd[0] < to_even[0], from_odd, from_even)
        cost, error, index = _cheaper(to_even, to_odd)
        cost = cost - cost.amin(dim=1, keepdim=True)
        chosen[j], parents[j] = index, parent
        residual = residual.gather(1, parent.unsqueeze(2).expand_as(residual))
        residual[:, :, j + 1 :] -= error.unsqueeze(2) * factor[j, j + 1 :]
    last = cost.argmin(dim=1, keepdim=True)
    indices = torch.empty(rows, columns, dtype=torch.int8, device=device)
    for j in reversed(range(columns)):
        indices[:, j] = chosen[j].gather(1, last).squeeze(1)
        last = parents[j].gather(1, last)
    return indices


def _cheaper(first, second):
    """Of two (cost, error, index), element by element, the second where it costs less."""
    return [torch.where(second[0] < first[0], b, a) for a, b in zip(first, second, strict=True)]


def _counts(indices: Tensor, limit: int) -> Tensor:
    return torch.bincount(indices.reshape(-1).long() + limit, minlength=2 * limit + 1).double()


def _rates(target: Tensor, limit: int) -> Tensor:
    """Bits (2, 2·limit + 1) of every index under each quantiser, from the nearest indices of `target`, in steps."""
    counted = []
    for quantizer in (0, 1):
        nearest = ((target.abs() + quantizer) * 0.5).clamp_max(limit).round() * target.sign()
        count = _counts(nearest, limit) + 0.5
        counted.append(-torch.log2(count / count.sum()))
    return torch.stack(counted)


def _entropy(indices: Tensor, quantizers: Tensor) -> float:
    """Bits a value of the index given its quantiser, with the frequencies of all of them."""
    bits = 0.0
    for quantizer in (0, 1):
        count = _counts(indices[quantizers == quantizer], 128)
        bits -= torch.special.xlogy(count, count / count.sum().clamp_min(1)).sum().item() / math.log(2)
    return bits / max(indices.numel(), 1)


def _check_arguments(
    weight: Tensor, hessian: Tensor, clip_sigmas: float, bits: int, states: int, rate_weight: float, damping: float
) -> None:
    _check(weight, hessian, bits, clip_sigmas, damping, act_order=True, block_size=1)
    check_states(states)
    if isinstance(rate_weight, bool) or not isinstance(rate_weight, (int, float)):
        raise TypeError(f"rate_weight: expected a float, got {type(rate_weight).__name__}")
    if not 0 <= rate_weight < math.inf:
        raise ValueError(f"rate_weight: {rate_weight} is not accepted; it must be 0 or more and finite")
