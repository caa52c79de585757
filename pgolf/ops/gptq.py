"""GPTQ: round a matrix column by column, each column's error pushed onto the columns still to come.

For weights W (M, N) that multiply inputs with second moments H = Σ x xᵀ (N, N), rounded to values q and a scale s a
row, the loss is tr((W - Q) H (W - Q)ᵀ) with Q = s·q:

    s_r = clip_sigmas · std(W_r) / qmax, rounded to float16;    qmax = 2^(bits-1) - 1
    H  ← H + damping · mean(diag H) · I, columns in descending order of diag H (act_order)
    H⁻¹ = Uᵀ U, U upper triangular
    for each column j:  q_j = clamp(round(w_j / s), -qmax, qmax);   e = (w_j - s q_j) / U_jj;   w_t -= e U_jt for t > j

U comes from one Cholesky factorisation and one triangular solve: with J the reversal of order, J H J = L Lᵀ, so
H = V Vᵀ for the upper triangular V = J L J, and U = V⁻¹. Inside a block of columns the update touches the block only;
the columns behind it get one matrix product a block. Rounding is half to even.

Shapes and dtypes: weight (M, N) or bank (B, M, N), hessian (N, N), or (B, N, N) for a bank; floating. Work is done in
float32, in float64 if weight or hessian is float64. Result: values int8 like weight, scale float16 (M,) or (B, M).
Cost a matrix: 2/3 N³ FLOPs to factor and solve, M N² to push the errors on. Each matrix of a bank gives what it
gives alone.

What happens at the edges
- A dead column (zero on the diagonal of H) is rounded to nearest and pushes nothing.
- H not positive definite after damping: the damping of that matrix is multiplied by 10 (from at least 1e-4) until it
  factors, at most to 1.0; then `ValueError` names the matrix.
- A row without variance takes s = max|W_r| / qmax. A scale below 2^-24, the smallest float16, becomes 2^-24; one that
  overflows float16 raises `ValueError`.
- NaN or infinity, a negative diagonal or a lopsided H raise `ValueError`; nothing is silently repaired.
Sources: Frantar et al., arXiv 2210.17323; clipping at k standard deviations and the reversed factorisation are the
challenge's (its pull requests 1394 and 1948).
"""

import math

import torch
from torch import Tensor

from pgolf.ops import backends, checks

DAMPING_FLOOR = 1e-4
DAMPING_LIMIT = 1.0
SMALLEST_SCALE = 2.0**-24
LOPSIDED = 1e-3  # accepted difference of H and Hᵀ, relative to the largest value of H

backends.register("gptq")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    clip_sigmas: float = 12.85,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix or a bank so that tr((W - Q) H (W - Q)ᵀ) is small, Q = scale · values.

    Args:
        weight: (M, N) or (B, M, N), floating.
        hessian: (N, N), or (B, N, N) for a bank, or (N, N) shared by a bank; floating, symmetric.
        bits: 2 to 8.
        clip_sigmas: where rows are clipped, in standard deviations of the row, > 0.
        damping: added to the diagonal, in units of its mean, >= 0.
        act_order: columns in descending order of the Hessian's diagonal, else as they come.
        block_size: columns a block, >= 1; changes the speed, and the result by rounding only.
    Returns:
        values int8 like weight, in -(2^(bits-1)-1)..2^(bits-1)-1, and scale float16 of shape (M,) or (B, M).
    """
    _check(weight, hessian, bits, clip_sigmas, damping, act_order, block_size)
    backends.choose("gptq", weight.device.type)
    return gptq_reference(weight, hessian, bits, clip_sigmas, damping, act_order, block_size)


@torch.no_grad()
def gptq_reference(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    clip_sigmas: float = 12.85,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as for `gptq`."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    if weight.numel() == 0:
        return torch.zeros_like(weight, dtype=torch.int8), weight.new_zeros(weight.shape[:-1], dtype=torch.float16)
    bank = weight.to(dtype).reshape(-1, *weight.shape[-2:])  # (B, M, N)
    count, rows, columns = bank.shape
    h = hessian.to(dtype).expand(count, columns, columns)
    _check_values(bank, h)
    limit = 2 ** (bits - 1) - 1
    scale = _row_scale(bank, clip_sigmas, limit)  # (B, M) float16

    diagonal = h.diagonal(dim1=-2, dim2=-1)  # (B, N)
    order = torch.arange(columns, device=bank.device).expand(count, columns)
    if act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    h = h.gather(1, order.unsqueeze(2).expand_as(h)).gather(2, order.unsqueeze(1).expand_as(h))
    factor = _inverse_factor(h, damping)  # (B, N, N) upper triangular
    work = bank.mT.gather(1, order.unsqueeze(2).expand(-1, -1, rows))  # (B, N, M): a column is contiguous
    rounded = _round_columns(work, factor, scale.to(dtype), limit, block_size)

    values = torch.empty_like(rounded).scatter_(1, order.unsqueeze(2).expand_as(rounded), rounded)
    values = values.mT.to(torch.int8, memory_format=torch.contiguous_format)
    return values.reshape(weight.shape), scale.reshape(weight.shape[:-1])


def _round_columns(work: Tensor, factor: Tensor, scale: Tensor, limit: int, block_size: int) -> Tensor:
    """The rounded values (B, N, M) of `work` (B, N, M), which is overwritten; factor (B, N, N), scale (B, M)."""
    columns = work.shape[1]
    rounded = torch.empty_like(work)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            column = work[:, j]  # (B, M)
            q = (column / scale).round_().clamp_(-limit, limit)
            error = (column - q * scale) / factor[:, j, j].unsqueeze(1)
            work[:, j + 1 : stop] -= factor[:, j, j + 1 : stop].unsqueeze(2) * error.unsqueeze(1)
            rounded[:, j] = q
            errors[:, j - start] = error
        work[:, stop:] -= factor[:, start:stop, stop:].mT @ errors
    return rounded


def _row_scale(bank: Tensor, clip_sigmas: float, limit: int) -> Tensor:
    """The float16 scale (B, M) of every row of `bank` (B, M, N)."""
    deviation = bank.std(dim=-1) if bank.shape[-1] > 1 else torch.zeros_like(bank[..., 0])
    scale = clip_sigmas * deviation / limit
    scale = torch.where(deviation > 0, scale, bank.abs().amax(dim=-1) / limit)
    scale = scale.to(torch.float16).clamp_min(SMALLEST_SCALE)
    if not torch.isfinite(scale).all():
        matrix = int(torch.isinf(scale).any(dim=-1).nonzero()[0])
        raise ValueError(f"weight: a row of matrix {matrix} needs a scale above 65504, the largest float16")
    return scale


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U (B, N, N), upper triangular, with (hessian + damping)⁻¹ = Uᵀ U for each matrix."""
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)  # (B, N), a view
    alive = diagonal > 0
    mean = diagonal.sum(dim=-1, keepdim=True) / alive.sum(dim=-1, keepdim=True).clamp_min(1)  # (B, 1)
    mean = torch.where(mean > 0, mean, 1.0)
    base = torch.where(alive, diagonal, mean)
    diagonal.copy_(base + damping * mean)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
    while failed.any():
        damping = max(10 * damping, DAMPING_FLOOR)
        matrix = int(failed.nonzero()[0])
        if damping > DAMPING_LIMIT * (1 + 1e-6):
            raise ValueError(
                f"hessian: matrix {matrix} is not positive definite, even with {DAMPING_LIMIT} · mean(diag) added"
            )
        again = failed.nonzero().squeeze(1)
        diagonal[again] = base[again] + damping * mean[again]
        lower[again], failed[again] = torch.linalg.cholesky_ex(damped[again].flip(-2, -1))
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)


def _check(
    weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float, act_order: bool, block_size: int
) -> None:
    checks.tensor("weight", weight, checks.FLOATS)
    checks.tensor("hessian", hessian, checks.FLOATS)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight: shape {tuple(weight.shape)} is not accepted; expected (M, N) or (B, M, N)")
    columns = weight.shape[-1]
    expected = (columns, columns) if hessian.ndim == 2 else (*weight.shape[:-2], columns, columns)
    checks.shape("hessian", hessian, expected, "N, N for each matrix of weight")
    checks.same_device("weight", weight, hessian=hessian)
    checks.integer("bits", bits, 2, 8)
    checks.integer("block_size", block_size, 1, 2**31 - 1)
    for name, value in (("clip_sigmas", clip_sigmas), ("damping", damping)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 < clip_sigmas < math.inf:
        raise ValueError(f"clip_sigmas: {clip_sigmas} is not accepted; it must be positive and finite")
    if not 0 <= damping <= DAMPING_LIMIT:
        raise ValueError(f"damping: {damping} is not accepted; accepted are 0 to {DAMPING_LIMIT}")
    if not isinstance(act_order, bool):
        raise TypeError(f"act_order: expected a bool, got {type(act_order).__name__}")


def _check_values(bank: Tensor, hessian: Tensor) -> None:
    """Look at the numbers: bank (B, M, N), hessian (B, N, N)."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    largest = hessian.abs().amax(dim=(-2, -1))
    lopsided = (hessian - hessian.mT).abs().amax(dim=(-2, -1)) > LOPSIDED * largest
    for name, problem, bad in (
        ("weight", "holds NaN or infinity", ~torch.isfinite(bank).flatten(1).all(dim=1)),
        ("hessian", "holds NaN or infinity", ~torch.isfinite(hessian).flatten(1).all(dim=1)),
        ("hessian", "has a negative number on its diagonal", (diagonal < 0).any(dim=1)),
        ("hessian", "is not symmetric", lopsided),
    ):
        if bad.any():
            raise ValueError(f"{name}: matrix {int(bad.nonzero()[0])} {problem}")
