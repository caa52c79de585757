"""Coordinate descent after GPTQ: each value moved to the best integer given all others, each row's scale refitted.

GPTQ decides a column by what came before it, this by everything: the second starts where the first ends.
Cost a matrix: 2 M N² FLOPs for each of R and W H (the latter only for a refit), N for each value that moves. No result
depends on the number of threads.
"""

import torch
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.gptq import (
    LOPSIDED,
    SMALLEST_SCALE,
    flaws_of,
    of_ordinary_size,
    products_in_full,
    refuse,
    refuse_flaws,
    work_dtype,
)

LEAST_STEP = 0.501  # the native code has its own copy
LARGEST_SCALE = 65504.0

backends.register("gptq_refine", native=("cpu",))


def gptq_refine(
    weight: Tensor, hessian: Tensor, values: Tensor, scale: Tensor, bits: int, sweeps: int = 4, refits: int = 3
) -> tuple[Tensor, Tensor]:
    """Lower tr((W - Q) H (W - Q)ᵀ), Q = scale · values, by moving values and refitting scales.

    For weights W, second moments H, values q and a scale s a row, with R = (W - Q) H:

        sweep   for each column j:  t = R_j / (s H_jj);   where |t| > 0.501:  δ = clamp(round(t), ±qmax - q_j)
                                    q_j += δ;   R -= δ s H_j
        refit   s' = (q H wᵀ) / (q H qᵀ), rounded to float16;   kept where it is closer to the quotient than s was

    Each move lowers the loss by s² H_jj δ (2t - δ), and none raises it: t between 0.5 and 0.501 is left, where the move
    gains nothing and rounding errors decide. At most `sweeps` sweeps, a refit, again for `refits` times, and `sweeps`
    sweeps at the end; a row is done when a sweep and a refit change nothing. No damping is added, so the loss that
    falls is that under the hessian given; columns with zero on its diagonal stay as they are. Work is done in float32,
    in float64 (by the definition) if weight or hessian is float64. Not differentiable.

    Args:
        weight: (M, N) or (B, M, N), floating.
        hessian: (N, N), or (B, N, N) for a bank, or (N, N) shared by a bank; floating, symmetric.
        values: int8 like weight, in -(2^(bits-1)-1)..2^(bits-1)-1, as `gptq` returns them.
        scale: float16 (M,) or (B, M), > 0.
        bits: of a value, 2 to 8.
        sweeps: passes over the columns, at most, before each refit and at the end; >= 0.
        refits: times the scales are refitted, at most; 0 keeps them.
    Returns:
        values and scale, new tensors like those given.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device or number that does not fit; NaN, infinity, a negative diagonal or a lopsided
            hessian; values beyond their bits; a scale that is not positive and finite.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> weight, x = torch.randn(8, 16), torch.randn(100, 16)
        >>> values, scale = ops.gptq(weight, x.mT @ x, bits=4)
        >>> values, scale = ops.gptq_refine(weight, x.mT @ x, values, scale, bits=4)
        >>> values.shape, scale.shape
        (torch.Size([8, 16]), torch.Size([8]))

    Source: cyclic coordinate descent on the loss of GPTQ, Frantar et al., arXiv 2210.17323.
    """
    _check(weight, hessian, values, scale, bits, sweeps, refits)
    wide = work_dtype(weight, hessian) == torch.float64
    chosen = backends.choose("gptq_refine", weight.device.type, "float64" if wide else "")
    if chosen == "reference" or weight.numel() == 0:
        return gptq_refine_reference(weight, hessian, values, scale, bits, sweeps, refits)
    return _refine_on_cpu(weight, hessian, values, scale, bits, sweeps, refits)


@torch.no_grad()
def gptq_refine_reference(
    weight: Tensor, hessian: Tensor, values: Tensor, scale: Tensor, bits: int, sweeps: int = 4, refits: int = 3
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as for `gptq_refine`."""
    if weight.numel() == 0:
        return values.clone(), scale.clone()
    dtype, limit = work_dtype(weight, hessian), 2 ** (bits - 1) - 1
    bank = weight.to(dtype).reshape(-1, *weight.shape[-2:])  # (B, M, N)
    h = hessian.to(dtype).reshape(-1, *hessian.shape[-2:])
    _check_numbers(bank, flaws_of(h), values, scale, limit)
    h = of_ordinary_size(h).expand(len(bank), *hessian.shape[-2:])
    q, s = values.reshape(bank.shape).to(dtype), scale.reshape(bank.shape[:-1]).to(dtype)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # (B, N)
    with products_in_full(bank):
        whole, pushed = bank @ h, (bank - s.unsqueeze(-1) * q) @ h
    for done in range(refits + 1):
        for _ in range(sweeps):
            if not _sweep(h, inverse, s, limit, q, pushed):
                break
        if done < refits:
            s, pushed = _refit(q, whole, pushed, s)
    return q.to(torch.int8).reshape(values.shape), s.to(torch.float16).reshape(scale.shape)


def _sweep(hessian: Tensor, inverse: Tensor, scale: Tensor, limit: int, q: Tensor, pushed: Tensor) -> bool:
    """One pass over the columns, q and pushed = (W - Q) H (B, M, N) in place; whether anything moved."""
    moved = False
    for j in range(q.shape[-1]):
        offset = pushed[..., j] * inverse[:, j].unsqueeze(1)  # (B, M), in units of the weights
        change = torch.clamp(offset / scale, -limit - q[..., j], limit - q[..., j]).round_()
        change = torch.where(offset.abs() > LEAST_STEP * scale, change, 0.0)
        if change.any():
            q[..., j] += change
            pushed -= (change * scale).unsqueeze(2) * hessian[:, j].unsqueeze(1)
            moved = True
    return moved


def _refit(q: Tensor, whole: Tensor, pushed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (B, M) that fits best, and (W - Q) H with it; whole is W H."""
    of_whole, of_pushed = (q * whole).sum(dim=-1), (q * pushed).sum(dim=-1)
    best = of_whole * scale / (of_whole - of_pushed)
    rounded = best.to(torch.float16).to(best.dtype).clamp_min(SMALLEST_SCALE)
    better = (best > 0) & (best <= LARGEST_SCALE) & ((rounded - best).abs() < (scale - best).abs())
    fitted = torch.where(better, rounded, scale)
    changed = whole - (fitted / scale).unsqueeze(-1) * (whole - pushed)
    return fitted, torch.where(better.unsqueeze(-1), changed, pushed)


@torch.no_grad()
def _refine_on_cpu(
    weight: Tensor, hessian: Tensor, values: Tensor, scale: Tensor, bits: int, sweeps: int, refits: int
) -> tuple[Tensor, Tensor]:
    native, threads, limit = backends.native(), torch.get_num_threads(), 2 ** (bits - 1) - 1
    bank = weight.float().reshape(-1, *weight.shape[-2:]).contiguous()  # (B, M, N)
    rows, columns = bank.shape[1:]
    h = hessian.float().reshape(-1, columns, columns).contiguous()
    _check_numbers(bank, native.check_hessians(h.data_ptr(), len(h), columns, LOPSIDED, threads), values, scale, limit)
    h = of_ordinary_size(h)
    if len(h) < len(bank):  # one Hessian for all: one matrix with the rows of all
        rows *= len(bank)
    refined = values.clone(memory_format=torch.contiguous_format)
    fitted = scale.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    pointers = (tensor.data_ptr() for tensor in (bank, h, refined, fitted))
    native.refine(*pointers, len(h), rows, columns, limit, sweeps, refits, threads)
    return refined, fitted.to(torch.float16)


def _check(weight: Tensor, hessian: Tensor, values: Tensor, scale: Tensor, bits: int, sweeps: int, refits: int) -> None:
    checks.tensor("weight", weight, checks.FLOATS)
    checks.tensor("hessian", hessian, checks.FLOATS)
    checks.tensor("values", values, (torch.int8,))
    checks.tensor("scale", scale, (torch.float16,))
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight: shape {tuple(weight.shape)} is not accepted; expected (M, N) or (B, M, N)")
    columns = weight.shape[-1]
    expected = (columns, columns) if hessian.ndim == 2 else (*weight.shape[:-2], columns, columns)
    checks.shape("hessian", hessian, expected, "N, N for each matrix of weight")
    checks.shape("values", values, weight.shape, "the shape of weight")
    checks.shape("scale", scale, weight.shape[:-1], "one scale a row")
    checks.same_device("weight", weight, hessian=hessian, values=values, scale=scale)
    checks.integer("bits", bits, 2, 8)
    checks.integer("sweeps", sweeps, 0, 1 << 20)
    checks.integer("refits", refits, 0, 1 << 20)


def _check_numbers(bank: Tensor, flaws: list[int], values: Tensor, scale: Tensor, limit: int) -> None:
    refuse(~torch.isfinite(bank).flatten(1).all(dim=1), "weight", "holds NaN or infinity")
    refuse_flaws(flaws)
    least, most = (value.item() for value in torch.aminmax(values))
    if least < -limit or most > limit:
        raise ValueError(f"values: {least if least < -limit else most} is outside {-limit}..{limit}")
    if not ((scale > 0) & torch.isfinite(scale)).all():
        raise ValueError("scale: every one must be positive and finite")
