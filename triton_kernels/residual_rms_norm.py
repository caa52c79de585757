"""Residual add, mix with other streams, RMSNorm and scale, in one pass over rows; and its backward pass in another.

    u = x + branch,   m = w_0 u + Σ_i w_i z_i,   y = scale · m · r,   r = 1 / sqrt(mean(m²) + eps)
    d = grad_m + scale · r · grad_y - m · r³ · scale · mean(m · grad_y)
    dx = dbranch = w_0 d + grad_u,   dz_i = w_i d,   dw_0 = Σ d u,   dw_i = Σ d z_i   (sums over rows)

The backward pass computes m and r again from what it reads anyway. A program goes over many blocks of rows and keeps
its part of the sums in registers; they leave once a program, float32, and one small sum adds them in a fixed order.
`branch`, the streams z_i (0 to 3; with none m = u and there are no weights) and the kept sum u are compile-time flags.

Floor for T rows of D values, X = T·D·sizeof(x): forward a read of x, branch and each z and a write of m, y and, where
it is kept, u; backward a read of the same inputs and the gradients, and a write of one gradient for x and branch and
one for each z.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.memory import load_wide, store_narrow
from pgolf.triton_kernels.rms_norm import inverse_rms, norm_gradient
from pgolf.triton_kernels.row_launches import RowLaunch, launch_on, row_grid, row_grid_on_hopper
from pgolf.triton_kernels.variants import Variant, signature

MOST_COLUMNS, MOST_STREAMS = 4096, 3
# Backward by number of streams.
LAUNCHES = {90: RowLaunch(tile=1024, num_warps=4, resident=(8, 8, 5, 4, 3))}
SAFE_LAUNCH = RowLaunch(tile=1024, num_warps=4, resident=(4, 4, 4, 4, 3))


@triton.jit
def residual_rms_norm_kernel(
    x_ptr,  # floating [rows, columns], as branch, first, second and third
    branch_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    weights_ptr,  # floating [1 + STREAMS, columns]
    sum_ptr,  # as x, written with KEEP_SUM
    mixed_ptr,  # as x, written where it differs from x
    normed_ptr,  # as x
    rows,
    columns,
    scale,
    eps,
    BRANCH: tl.constexpr,
    STREAMS: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of 2, at least columns
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    if STREAMS > 0:
        w0 = load_wide(weights_ptr, column, column < columns)
        w1 = load_wide(weights_ptr + columns, column, column < columns)
    if STREAMS > 1:
        w2 = load_wide(weights_ptr + 2 * columns, column, column < columns)
    if STREAMS > 2:
        w3 = load_wide(weights_ptr + 3 * columns, column, column < columns)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * columns + column
        inside = (row < rows) & (column < columns)
        m = load_wide(x_ptr, at, inside)
        if BRANCH:
            m += load_wide(branch_ptr, at, inside)
        if KEEP_SUM:
            store_narrow(sum_ptr, at, m, inside)
        if STREAMS > 0:
            m = w0 * m + w1 * load_wide(first_ptr, at, inside)
        if STREAMS > 1:
            m += w2 * load_wide(second_ptr, at, inside)
        if STREAMS > 2:
            m += w3 * load_wide(third_ptr, at, inside)
        if BRANCH or STREAMS > 0:
            store_narrow(mixed_ptr, at, m, inside)
        store_narrow(normed_ptr, at, m * (scale * inverse_rms(m, columns, eps)), inside)


@triton.jit
def residual_rms_norm_backward_kernel(
    x_ptr,  # floating [rows, columns], as all that follow but the weights and their gradients
    branch_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    weights_ptr,  # floating [1 + STREAMS, columns]
    grad_sum_ptr,  # read with GRAD_SUM
    grad_mixed_ptr,  # read with GRAD_MIXED
    grad_normed_ptr,
    dx_ptr,
    dfirst_ptr,
    dsecond_ptr,
    dthird_ptr,
    partial_ptr,  # float32 [programs, 1 + STREAMS, columns]: a program's part of the weights' gradients
    rows,
    columns,
    scale,
    eps,
    BRANCH: tl.constexpr,
    STREAMS: tl.constexpr,
    GRAD_SUM: tl.constexpr,
    GRAD_MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    if STREAMS > 0:
        w0 = load_wide(weights_ptr, column, column < columns)
        w1 = load_wide(weights_ptr + columns, column, column < columns)
        dw0 = tl.zeros((ROWS, COLUMNS), tl.float32)
        dw1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if STREAMS > 1:
        w2 = load_wide(weights_ptr + 2 * columns, column, column < columns)
        dw2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if STREAMS > 2:
        w3 = load_wide(weights_ptr + 3 * columns, column, column < columns)
        dw3 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * columns + column
        inside = (row < rows) & (column < columns)
        u = load_wide(x_ptr, at, inside)
        if BRANCH:
            u += load_wide(branch_ptr, at, inside)
        m = u
        if STREAMS > 0:
            first = load_wide(first_ptr, at, inside)
            m = w0 * u + w1 * first
        if STREAMS > 1:
            second = load_wide(second_ptr, at, inside)
            m += w2 * second
        if STREAMS > 2:
            third = load_wide(third_ptr, at, inside)
            m += w3 * third
        d = norm_gradient(m, load_wide(grad_normed_ptr, at, inside), columns, eps, scale)
        if GRAD_MIXED:
            d += load_wide(grad_mixed_ptr, at, inside)
        if STREAMS > 0:
            store_narrow(dfirst_ptr, at, w1 * d, inside)
            dw0 += d * u
            dw1 += d * first
        if STREAMS > 1:
            store_narrow(dsecond_ptr, at, w2 * d, inside)
            dw2 += d * second
        if STREAMS > 2:
            store_narrow(dthird_ptr, at, w3 * d, inside)
            dw3 += d * third
        if STREAMS > 0:
            d = w0 * d
        if GRAD_SUM:
            d += load_wide(grad_sum_ptr, at, inside)
        store_narrow(dx_ptr, at, d, inside)
    if STREAMS > 0:
        column = tl.arange(0, COLUMNS)
        partial_ptr += tl.program_id(0) * (1 + STREAMS) * columns
        tl.store(partial_ptr + column, tl.sum(dw0, 0), mask=column < columns)
        tl.store(partial_ptr + columns + column, tl.sum(dw1, 0), mask=column < columns)
        if STREAMS > 1:
            tl.store(partial_ptr + 2 * columns + column, tl.sum(dw2, 0), mask=column < columns)
        if STREAMS > 2:
            tl.store(partial_ptr + 3 * columns + column, tl.sum(dw3, 0), mask=column < columns)


def accepts(dtype: torch.dtype, columns: int) -> bool:
    """Whether the kernels compute this; the rest is for plain PyTorch."""
    return dtype != torch.float64 and columns <= MOST_COLUMNS


def launch(
    x: Tensor,  # (T, D), as branch and streams, all contiguous
    branch: Tensor | None,
    streams: list[Tensor],
    weights: Tensor | None,  # (1 + streams, D)
    scale: float,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(u where it is kept, m where it is not x, y), each (T, D)."""
    kept = torch.empty_like(x) if keep_sum else None
    mixed = torch.empty_like(x) if branch is not None or streams else None
    normed = torch.empty_like(x)
    with torch.cuda.device_of(x):
        residual_rms_norm_kernel[_grid(x, 0)](
            *_inputs(x, branch, streams, weights),
            *(x if out is None else out for out in (kept, mixed)),
            normed,
            *x.shape,
            scale,
            eps,
            KEEP_SUM=keep_sum,
            **_flags(branch is not None, len(streams), x.shape[1], _config(x)),
        )
    return kept, mixed, normed


def launch_backward(
    x: Tensor,  # (T, D), as branch, streams and gradients, all contiguous
    branch: Tensor | None,
    streams: list[Tensor],
    weights: Tensor | None,
    grad_sum: Tensor | None,
    grad_mixed: Tensor | None,
    grad_normed: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """(dx and dbranch, the streams' gradients, the weights' gradient in float32)."""
    dx = torch.empty_like(x)
    gradients = [torch.empty_like(stream) for stream in streams]
    grid = _grid(x, 1 + len(streams))
    partial = x.new_empty((*grid, 1 + len(streams), x.shape[1]), dtype=torch.float32) if streams else None
    with torch.cuda.device_of(x):
        residual_rms_norm_backward_kernel[grid](
            *_inputs(x, branch, streams, weights),
            *(x if gradient is None else gradient for gradient in (grad_sum, grad_mixed)),
            grad_normed,
            dx,
            *_padded(gradients, dx),
            dx if partial is None else partial,
            *x.shape,
            scale,
            eps,
            GRAD_SUM=grad_sum is not None,
            GRAD_MIXED=grad_mixed is not None,
            **_flags(branch is not None, len(streams), x.shape[1], _config(x)),
        )
    return dx, gradients, None if partial is None else partial.sum(0)


def _inputs(x: Tensor, branch: Tensor | None, streams: list[Tensor], weights: Tensor | None) -> list[Tensor]:
    return [x, x if branch is None else branch, *_padded(streams, x), x if weights is None else weights]


def _padded(tensors: list[Tensor], filler: Tensor) -> list[Tensor]:
    """MOST_STREAMS tensors; those that the flags leave out are never touched."""
    return [*tensors, *[filler] * (MOST_STREAMS - len(tensors))]


def _config(x: Tensor) -> RowLaunch:
    return launch_on(x.device, LAUNCHES, SAFE_LAUNCH)


def _grid(x: Tensor, kernel: int) -> tuple[int]:
    """`kernel`: 0 the forward one, 1 + number of streams a backward one."""
    config = _config(x)
    return row_grid(x.device, x.shape[0], config.rows(x.shape[1]), config.resident[kernel])


def _flags(branch: bool, streams: int, columns: int, config: RowLaunch) -> dict[str, int | bool]:
    return {
        "BRANCH": branch,
        "STREAMS": streams,
        "ROWS": config.rows(columns),
        "COLUMNS": triton.next_power_of_2(columns),
        "STAGES": config.stages,
        "num_warps": config.num_warps,
    }


def _variant(branch: bool, streams: int, kept: bool, backward: bool, rows: int = 98304, columns: int = 512) -> Variant:
    config = LAUNCHES[90]
    kernel = residual_rms_norm_backward_kernel if backward else residual_rms_norm_kernel
    last = streams == MOST_STREAMS  # the norm after two lanes: nothing else reads m
    two = branch and not (backward and (kept or not streams))  # a sum that was stored is read in place of its parts
    constexprs = _flags(two, streams, columns, config) | (
        {"GRAD_SUM": kept, "GRAD_MIXED": not last} if backward else {"KEEP_SUM": kept}
    )
    num_warps = int(constexprs.pop("num_warps"))
    names = kernel.arg_names
    grid = row_grid_on_hopper(rows, config.rows(columns), config.resident[1 + streams if backward else 0])
    # Forward: the inputs in; m, y and u out. Backward: the inputs and the outputs' gradients in; gradients out.
    moved = 1 + two + streams + 2 + kept + ((1 + streams - last) if backward else 0)
    weights = (1 + streams) * columns * 2 if streams else 0
    sums = grid * (1 + streams) * columns * 4 * 2 if backward and streams else 0  # written, and read by the sum
    parts = ["add"] * branch + [[], ["mix"], ["mix", "skip"], ["merge"]][streams] + ["keep sum"] * kept
    return Variant(
        name=f"residual_rms_norm {' + '.join(parts)} {'backward' if backward else 'forward'} bf16 {rows}x{columns}",
        kernel=kernel,
        signature=signature(kernel, constexprs, partial_ptr="*fp32", scale="fp32", eps="fp32"),
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        programs=grid,
        bytes_moved=moved * rows * columns * 2 + weights + sums,
        flops=(12 + 5 * streams if backward else 4 + branch + 2 * streams) * rows * columns,
        aligned=(*(name for name in names if name.endswith("_ptr")), "columns"),
    )


FORMS = [(False, 1, False), (True, 0, False), (True, 1, False), (True, 1, True), (True, 2, False), (False, 3, False)]
VARIANTS = [_variant(*form, backward) for form in FORMS for backward in (False, True)]
