"""GPTQ: round a matrix column by column, each column's error pushed onto the columns still to come.

Why the order is reversed: with H = V D Vᵀ and e = (W - Q) V the loss is Σ_k D_k |e_k|², of which w_k - s q_k is column
k, so each q_k is the best there is, given those before it. Taking the last column first is what needs one factorisation
only; GPTQ as published wants the factor of H⁻¹, which is V⁻¹ in the opposite order, and gives the same values. Columns
are taken a block at a time: inside a block the sum is kept column by column, the columns behind it get one matrix
product a block.

Cost a matrix: N³/3 FLOPs to factor, M N² for the sums, both once; 4 (M + 1.5 N) N bytes read at least.

Backends round differently in the last bit of the sums: values may differ from the definition's where w_k / s lies
within such an error of a tie, and then in later columns of that row. On the CPU the native values depend neither on
the number of threads nor on block_size, and the sums use fused multiply-add where the CPU has it; a Hessian that is
shared by a bank is factored once. On CUDA one launch a block rounds every row of every matrix, 128 columns at most,
and PyTorch does the factorisation and the products, in full float32.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pgolf.ops import backends, checks

DAMPING_FLOOR = 1e-4
DAMPING_LIMIT = 1.0
SMALLEST_SCALE = 2.0**-24
ORDINARY_HALF = 20  # Hessians whose largest number lies in 2^-40..2^40 are worked on as they are
LOPSIDED = 1e-3  # accepted difference of H and Hᵀ, relative to the largest value of H
MOST_BLOCK_COLUMNS = 128  # of the CUDA kernel
FLAWS = {1: "holds NaN or infinity", 2: "has a negative number on its diagonal", 4: "is not symmetric"}  # of a Hessian

backends.register("gptq", native=("cpu", "cuda"))


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

    For weights W (M, N) that multiply inputs x with second moments H = Σ x xᵀ, values q and a scale s a row:

        s_r = clip_sigmas · std(W_r) / qmax, rounded to float16;    qmax = 2^(bits-1) - 1
        H  ← H + damping · mean(diag H) · I, columns in ascending order of diag H (act_order), else the last first
        H  = V D Vᵀ, V lower triangular with ones on its diagonal, D diagonal
        for each column k, the last first:  w_k = W_k + Σ_{j>k} (W_j - s q_j) V_jk;  q_k = clamp(round(w_k / s), ±qmax)

    Rounding is half to even. Work is done in float32, in float64 (by the definition, on every backend) if weight or
    hessian is float64. Each matrix of a bank gives what it gives alone. Not differentiable. At the edges:
    - A dead column (zero on the diagonal of H) is rounded to nearest and pushes nothing.
    - H not positive definite after damping: the damping of that matrix is multiplied by 10 (from at least 1e-4) until
      it factors, at most to 1.0.
    - A row without variance takes s = max|W_r| / qmax. A scale below 2^-24, the smallest float16, becomes 2^-24.
    - H of any size will do: far from 1 it is scaled by a power of four, which changes no bit of the result.

    Args:
        weight: (M, N) or (B, M, N), floating.
        hessian: (N, N), or (B, N, N) for a bank, or (N, N) shared by a bank; floating, symmetric.
        bits: of a value, 2 to 8.
        clip_sigmas: where rows are clipped, in standard deviations of the row, > 0.
        damping: added to the diagonal, in units of its mean, 0 to 1.
        act_order: columns are taken in descending order of the Hessian's diagonal, else as they come.
        block_size: columns a block, >= 1; changes the speed, and the result by rounding only.
    Returns:
        values int8 like weight, in -(2^(bits-1)-1)..2^(bits-1)-1, and scale float16 of shape (M,) or (B, M).
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device or number that does not fit; NaN, infinity, a negative diagonal or a lopsided H; a
            matrix that cannot be factored (it is named); a scale that overflows float16. Nothing is silently repaired.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> weight, x = torch.randn(8, 16), torch.randn(100, 16)
        >>> values, scale = ops.gptq(weight, x.mT @ x, bits=6)
        >>> values.dtype, values.shape, scale.dtype, scale.shape
        (torch.int8, torch.Size([8, 16]), torch.float16, torch.Size([8]))

    Sources: Frantar et al., arXiv 2210.17323; clipping at k standard deviations and the reversed factorisation, PRs
    #1394 and #1948 of the challenge.
    """
    _check(weight, hessian, bits, clip_sigmas, damping, act_order, block_size)
    arguments = (weight, hessian, bits, clip_sigmas, damping, act_order, block_size)
    wide = work_dtype(weight, hessian) == torch.float64
    chosen = backends.choose("gptq", weight.device.type, "float64" if wide else "")
    if chosen == "reference" or weight.numel() == 0:
        return gptq_reference(*arguments)
    return _gptq_on_cuda(*arguments) if weight.is_cuda else _gptq_on_cpu(*arguments)


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
    if weight.numel() == 0:
        return torch.zeros_like(weight, dtype=torch.int8), weight.new_zeros(weight.shape[:-1], dtype=torch.float16)
    dtype = work_dtype(weight, hessian)
    bank = weight.to(dtype).reshape(-1, *weight.shape[-2:])  # (B, M, N)
    limit = 2 ** (bits - 1) - 1
    scale = row_scale(bank, clip_sigmas, limit)  # (B, M) float16
    h = hessian.to(dtype).reshape(-1, *hessian.shape[-2:])
    refuse_flaws(flaws_of(h))
    h = of_ordinary_size(h).expand(len(bank), *hessian.shape[-2:])
    order = _order(h, act_order)
    factor = _factor(h, order, damping)
    work = _factored_order(bank, order)
    with products_in_full(bank):
        rounded = round_columns(work, factor, scale.to(dtype), limit, block_size)
    return _as_given(rounded, order).reshape(weight.shape), scale.reshape(weight.shape[:-1])


def round_columns(weight: Tensor, factor: Tensor, scale: Tensor, limit: int, block_size: int) -> Tensor:
    """The rounded values (B, N, M) of weight (B, N, M), columns as factored; factor V (B, N, N), scale (B, M)."""
    sums, rounded = weight.clone(), torch.empty_like(weight)
    for stop in range(weight.shape[1], 0, -block_size):
        start = max(stop - block_size, 0)
        differences = torch.empty_like(weight[:, start:stop])
        for j in reversed(range(start, stop)):
            q = (sums[:, j] / scale).round_().clamp_(-limit, limit)  # (B, M)
            difference = weight[:, j] - q * scale
            sums[:, start:j] += factor[:, j, start:j].unsqueeze(2) * difference.unsqueeze(1)
            rounded[:, j] = q
            differences[:, j - start] = difference
        sums[:, :start] += factor[:, start:stop, :start].mT @ differences
    return rounded


@torch.no_grad()
def _gptq_on_cpu(
    weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float, act_order: bool, block_size: int
) -> tuple[Tensor, Tensor]:
    """By the extension; block_size makes no difference."""
    native, threads = backends.native(), torch.get_num_threads()
    bank = weight.float().reshape(-1, *weight.shape[-2:]).contiguous()  # (B, M, N)
    rows, columns = bank.shape[1:]
    limit = 2 ** (bits - 1) - 1
    scale = row_scale(bank, clip_sigmas, limit)  # (B, M) float16
    h = hessian.float().reshape(-1, columns, columns).contiguous()
    if len(h) < len(bank):  # one Hessian for all: one matrix with the rows of all
        rows *= len(bank)
    shape = (len(h), columns)
    refuse_flaws(native.check_hessians(h.data_ptr(), *shape, LOPSIDED, threads))
    h = of_ordinary_size(h)
    order = _order(h, act_order)
    factors = h.new_empty(len(h), native.factor_size(columns))

    def attempt(diagonal: Tensor, which: list[int]) -> list[int]:
        pointers = (order.data_ptr(), diagonal.data_ptr())
        return native.factor_hessians(h.data_ptr(), *shape, *pointers, which, factors.data_ptr(), threads)

    with_enough_damping(h.diagonal(dim1=-2, dim2=-1), damping, attempt)
    values, exact_scale = torch.empty_like(bank, dtype=torch.int8), scale.float()
    pointers = (tensor.data_ptr() for tensor in (bank, order, factors, exact_scale, values))
    native.round_columns(*pointers, len(h), rows, columns, limit, threads)
    return values.reshape(weight.shape), scale.reshape(weight.shape[:-1])


@torch.no_grad()
def _gptq_on_cuda(
    weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float, act_order: bool, block_size: int
) -> tuple[Tensor, Tensor]:
    """Rows of all matrices by one launch a block, the rest by PyTorch."""
    bank = weight.float().reshape(-1, *weight.shape[-2:])  # (B, M, N)
    limit = 2 ** (bits - 1) - 1
    scale = row_scale(bank, clip_sigmas, limit)  # (B, M) float16
    h = hessian.float().reshape(-1, *hessian.shape[-2:])
    grouped = bank.reshape(len(h), -1, bank.shape[-1])  # one Hessian for all: one matrix with the rows of all
    refuse_flaws(flaws_of(h))
    h = of_ordinary_size(h)
    order = _order(h, act_order)
    factor = _factor(h, order, damping).contiguous()
    work = _factored_order(grouped, order)
    with products_in_full(bank):
        rounded = _round_columns_on_cuda(work, factor, scale.float().reshape(len(h), -1), limit, block_size)
    return _as_given(rounded, order).reshape(weight.shape), scale.reshape(weight.shape[:-1])


def _round_columns_on_cuda(weight: Tensor, factor: Tensor, scale: Tensor, limit: int, block_size: int) -> Tensor:
    """`round_columns`, int8, in blocks of 128 columns at most; all contiguous."""
    block_size = min(block_size, MOST_BLOCK_COLUMNS)
    count, columns, rows = weight.shape
    sums, rounded = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    differences = weight.new_empty(count * min(block_size, columns) * rows)
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream().cuda_stream
        for stop in range(columns, 0, -block_size):
            start = max(stop - block_size, 0)
            block = differences[: count * (stop - start) * rows].view(count, stop - start, rows)
            pointers = (tensor.data_ptr() for tensor in (weight, sums, factor, scale, rounded, block))
            backends.native().round_block_cuda(*pointers, count, rows, columns, start, stop - start, limit, stream)
            if start:
                sums[:, :start].baddbmm_(factor[:, start:stop, :start].mT, block)
    return rounded


def row_scale(bank: Tensor, clip_sigmas: float, limit: int) -> Tensor:
    """The float16 scale (B, M) of every row of `bank` (B, M, N)."""
    flat = bank.reshape(-1, bank.shape[-1])
    at_once = len(flat) if flat.is_cuda else max(1, (1 << 17) // flat.shape[1])  # rows that stay in a CPU's cache
    deviation = torch.cat([row_deviation(rows) for rows in flat.split(at_once)])
    scale = clip_sigmas * deviation / limit
    level = deviation == 0
    if level.any():
        scale[level] = flat[level].abs().amax(dim=-1) / limit
    scale = scale.to(torch.float16).clamp_min(SMALLEST_SCALE).reshape(bank.shape[:-1])
    wrong = ~torch.isfinite(scale)
    if wrong.any():
        refuse(~torch.isfinite(bank).flatten(1).all(dim=1), "weight", "holds NaN or infinity")
        matrix = int(wrong.any(dim=-1).nonzero()[0])
        raise ValueError(f"weight: a row of matrix {matrix} needs a scale above 65504, the largest float16")
    return scale


def row_deviation(rows: Tensor) -> Tensor:
    """The standard deviation of each row (R, N), exactly 0 for a row of equal numbers, NaN for NaN and infinity."""
    shifted = rows - rows[:, :1]
    shifted -= shifted.mean(dim=1, keepdim=True)
    return torch.linalg.vector_norm(shifted, dim=1) / max(rows.shape[1] - 1, 1) ** 0.5


def _order(hessian: Tensor, act_order: bool) -> Tensor:
    """Column of `hessian` (B, N, N) at each place (B, N), in the order in which they are factored."""
    count, columns = hessian.shape[:2]
    if not act_order:
        return torch.arange(columns - 1, -1, -1, device=hessian.device).repeat(count, 1)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    return diagonal.argsort(dim=-1, descending=True, stable=True).flip(-1)  # of equals the first is rounded first


def _factored_order(bank: Tensor, order: Tensor) -> Tensor:
    """(B, N, M) of bank (B, M, N): the rows of a column side by side, columns in `order`."""
    return bank.mT.gather(1, order.unsqueeze(2).expand(-1, -1, bank.shape[1]))


def _as_given(rounded: Tensor, order: Tensor) -> Tensor:
    """int8 (B, M, N), columns where they were, of rounded (B, N, M)."""
    values = torch.empty_like(rounded).scatter_(1, order.unsqueeze(2).expand_as(rounded), rounded)
    return values.mT.to(torch.int8, memory_format=torch.contiguous_format)


def _factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """V (B, N, N), lower triangular with ones on its diagonal, of the damped Hessians with their columns in `order`."""
    h = hessian.gather(1, order.unsqueeze(2).expand_as(hessian)).gather(2, order.unsqueeze(1).expand_as(hessian))
    lower = torch.empty_like(h)

    def attempt(diagonal: Tensor, which: list[int]) -> list[int]:
        h.diagonal(dim1=-2, dim2=-1)[which] = diagonal[which].gather(1, order[which])
        lower[which], failed = torch.linalg.cholesky_ex(h[which])
        return [which[i] for i in failed.nonzero().flatten().tolist()]

    with_enough_damping(hessian.diagonal(dim1=-2, dim2=-1), damping, attempt)
    return lower.div_(lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).clone())


def with_enough_damping(diagonal: Tensor, damping: float, attempt: Callable[[Tensor, list[int]], list[int]]) -> None:
    """Call `attempt(damped diagonals (B, N), matrices)` until it returns no matrix that is not positive definite."""
    alive = diagonal > 0
    mean = diagonal.sum(dim=-1, keepdim=True) / alive.sum(dim=-1, keepdim=True).clamp_min(1)  # (B, 1)
    mean = torch.where(mean > 0, mean, 1.0)
    base = torch.where(alive, diagonal, mean)
    damped = base + damping * mean
    failed = attempt(damped, list(range(len(damped))))
    while failed:
        damping = max(10 * damping, DAMPING_FLOOR)
        if damping > DAMPING_LIMIT * (1 + 1e-6):
            raise ValueError(
                f"hessian: matrix {failed[0]} is not positive definite, even with {DAMPING_LIMIT} · mean(diag) added"
            )
        damped[failed] = base[failed] + damping * mean[failed]
        failed = attempt(damped, failed)


@contextlib.contextmanager
def products_in_full(bank: Tensor) -> Iterator[None]:
    """Matrix products in float32, not in TF32, which would cost the values three digits."""
    before = torch.get_float32_matmul_precision()
    if bank.is_cuda:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if bank.is_cuda:
            torch.set_float32_matmul_precision(before)


def work_dtype(weight: Tensor, hessian: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)


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


def flaws_of(hessian: Tensor) -> list[int]:
    """For each matrix of (B, N, N) the sum of its FLAWS."""
    largest = hessian.abs().amax(dim=(-2, -1))
    wrong = {
        1: ~torch.isfinite(largest),
        2: (hessian.diagonal(dim1=-2, dim2=-1) < 0).any(dim=1),
        4: (hessian - hessian.mT).abs().amax(dim=(-2, -1)) > LOPSIDED * largest,
    }
    return sum(flaw * bad.int() for flaw, bad in wrong.items()).tolist()  # type: ignore[union-attr]


def of_ordinary_size(hessian: Tensor) -> Tensor:
    """Matrices (B, N, N) of huge or tiny numbers by a power of four each, so that no sum or product leaves the dtype's
    range. What is made of them is the same to the bit: it needs products, quotients and square roots only."""
    largest = hessian.diagonal(dim1=-2, dim2=-1).amax(dim=-1).tolist()
    halves = [math.frexp(each)[1] // 2 for each in largest]  # of the exponents
    if all(abs(half) <= ORDINARY_HALF for half in halves):
        return hessian
    factors = hessian.new_tensor([math.ldexp(1.0, -half) for half in halves]).reshape(-1, 1, 1)
    return hessian * factors * factors  # one after the other: the square of one may be beyond the range


def refuse_flaws(flaws: list[int]) -> None:
    for flaw, problem in FLAWS.items():
        refuse(torch.tensor(flaws) & flaw != 0, "hessian", problem)


def refuse(bad: Tensor, name: str, problem: str) -> None:
    if bad.any():
        raise ValueError(f"{name}: matrix {int(bad.nonzero()[0])} {problem}")
