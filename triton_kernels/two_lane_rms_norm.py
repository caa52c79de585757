"""Two lanes between one layer's branches and the next one's norms, in one pass; and the backward pass in another.

    a = k_0 lane_0 + Σ_j p_{j0} branch_j,   b = k_1 lane_1 + Σ_j p_{j1} branch_j,   a' = s_0 a + s_1 skip,
    m = m_0 a' + m_1 x_0,   y_0 = scale · m · r(m),   y_1 = scale · b · r(b),   r(z) = 1 / sqrt(mean(z²) + eps)
    dm = norm's gradient of y_0,   da' = grad a' + m_0 dm,   da = s_0 da',   db = grad b + norm's gradient of y_1
    dlane_i = k_i (da, db)_i,   dbranch_j = p_{j0} da + p_{j1} db,   dx_0 = m_1 dm,   dskip = s_1 da'
    dm_0 = Σ dm a',  dm_1 = Σ dm x_0,  ds_0 = Σ da' a,  ds_1 = Σ da' skip       a channel, sums over rows
    dk_i = Σ (da, db)_i lane_i,   dp_{ji} = Σ (da, db)_i branch_j                one number, sums over rows and channels

The backward pass computes a, a', b, m and both norms again. All sums stay in registers, element by element, and leave
once a program; one small sum adds them in a fixed order. Where the lanes part there is one lane to read; branches (0 to
2), the skip and that are compile-time flags.

Floor for X bytes of a lane, with both lanes, two branches and a skip: 10 X forward and 16 X backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.memory import load_wide, store_narrow
from pgolf.triton_kernels.rms_norm import inverse_rms, norm_gradient
from pgolf.triton_kernels.row_launches import RowLaunch, launch_on, row_grid, row_grid_on_hopper
from pgolf.triton_kernels.variants import Variant, signature

MOST_COLUMNS = 4096
SCALARS = 6  # k_0, k_1, p_00, p_01, p_10, p_11
LAUNCHES = {90: RowLaunch(tile=512, num_warps=4, resident=(8, 3))}
SAFE_LAUNCH = RowLaunch(tile=512, num_warps=4, resident=(4, 3))


@triton.jit
def route(
    first_ptr, second_ptr, attention_ptr, mlp_ptr, k0, k1, p00, p01, p10, p11, at, inside,
    PARTED: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """Both lanes and both branches (zero where there is none), and a and b."""
    first = load_wide(first_ptr, at, inside)
    second = first
    attention = tl.zeros_like(first)
    mlp = attention
    if PARTED:
        second = load_wide(second_ptr, at, inside)
    a = k0 * first
    b = k1 * second
    if BRANCHES > 0:
        attention = load_wide(attention_ptr, at, inside)
        a += p00 * attention
        b += p01 * attention
    if BRANCHES > 1:
        mlp = load_wide(mlp_ptr, at, inside)
        a += p10 * mlp
        b += p11 * mlp
    return first, second, attention, mlp, a, b


@triton.jit
def load_scalars(keep_ptr, post_ptr):
    k0 = tl.load(keep_ptr).to(tl.float32)
    k1 = tl.load(keep_ptr + 1).to(tl.float32)
    p00 = tl.load(post_ptr).to(tl.float32)
    p01 = tl.load(post_ptr + 1).to(tl.float32)
    p10 = tl.load(post_ptr + 2).to(tl.float32)
    p11 = tl.load(post_ptr + 3).to(tl.float32)
    return k0, k1, p00, p01, p10, p11


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def two_lane_rms_norm_kernel(
    first_ptr,  # floating [rows, columns], as second, attention, mlp, x0 and skip
    second_ptr,
    attention_ptr,
    mlp_ptr,
    keep_ptr,  # floating [2]
    post_ptr,  # floating [2, 2]
    x0_ptr,
    mix_ptr,  # floating [2, columns]
    skip_ptr,
    skip_weights_ptr,  # floating [2, columns]
    first_out_ptr,  # as first, like the three that follow
    second_out_ptr,
    first_normed_ptr,
    second_normed_ptr,
    rows,
    columns,
    scale,
    eps,
    PARTED: tl.constexpr,  # two lanes are read, not one
    BRANCHES: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of 2, at least columns
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    k0, k1, p00, p01, p10, p11 = load_scalars(keep_ptr, post_ptr)
    m0 = load_wide(mix_ptr, column, column < columns)
    m1 = load_wide(mix_ptr + columns, column, column < columns)
    if SKIP:
        s0 = load_wide(skip_weights_ptr, column, column < columns)
        s1 = load_wide(skip_weights_ptr + columns, column, column < columns)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * columns + column
        inside = (row < rows) & (column < columns)
        _, _, _, _, a, b = route(
            first_ptr, second_ptr, attention_ptr, mlp_ptr, k0, k1, p00, p01, p10, p11, at, inside, PARTED, BRANCHES
        )
        store_narrow(second_out_ptr, at, b, inside)
        store_narrow(second_normed_ptr, at, b * (scale * inverse_rms(b, columns, eps)), inside)
        if SKIP:
            a = s0 * a + s1 * load_wide(skip_ptr, at, inside)
        store_narrow(first_out_ptr, at, a, inside)
        m = m0 * a + m1 * load_wide(x0_ptr, at, inside)
        store_narrow(first_normed_ptr, at, m * (scale * inverse_rms(m, columns, eps)), inside)


@triton.jit
def two_lane_rms_norm_backward_kernel(
    first_ptr,  # as in the forward kernel
    second_ptr,
    attention_ptr,
    mlp_ptr,
    keep_ptr,
    post_ptr,
    x0_ptr,
    mix_ptr,
    skip_ptr,
    skip_weights_ptr,
    grad_first_ptr,  # gradients of the four results, as they are
    grad_second_ptr,
    grad_first_normed_ptr,
    grad_second_normed_ptr,
    dfirst_ptr,  # as first, like the five that follow
    dsecond_ptr,
    dattention_ptr,
    dmlp_ptr,
    dx0_ptr,
    dskip_ptr,
    partial_ptr,  # float32 [programs, (2 + 2 SKIP) columns + 6]: a program's part of the gradients of the weights
    rows,
    columns,
    scale,
    eps,
    PARTED: tl.constexpr,
    BRANCHES: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    k0, k1, p00, p01, p10, p11 = load_scalars(keep_ptr, post_ptr)
    m0 = load_wide(mix_ptr, column, column < columns)
    m1 = load_wide(mix_ptr + columns, column, column < columns)
    dm0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    dm1 = dm0
    dk0 = dm0
    dk1 = dm0
    if SKIP:
        s0 = load_wide(skip_weights_ptr, column, column < columns)
        s1 = load_wide(skip_weights_ptr + columns, column, column < columns)
        ds0 = dm0
        ds1 = dm0
    if BRANCHES > 0:
        dp00 = dm0
        dp01 = dm0
    if BRANCHES > 1:
        dp10 = dm0
        dp11 = dm0
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * columns + column
        inside = (row < rows) & (column < columns)
        first, second, attention, mlp, a, b = route(
            first_ptr, second_ptr, attention_ptr, mlp_ptr, k0, k1, p00, p01, p10, p11, at, inside, PARTED, BRANCHES
        )
        db = norm_gradient(b, load_wide(grad_second_normed_ptr, at, inside), columns, eps, scale)
        db += load_wide(grad_second_ptr, at, inside)
        x0 = load_wide(x0_ptr, at, inside)
        skipped = a
        if SKIP:
            skip = load_wide(skip_ptr, at, inside)
            skipped = s0 * a + s1 * skip
        dm = norm_gradient(m0 * skipped + m1 * x0, load_wide(grad_first_normed_ptr, at, inside), columns, eps, scale)
        store_narrow(dx0_ptr, at, m1 * dm, inside)
        dm0 += dm * skipped
        dm1 += dm * x0
        da = m0 * dm + load_wide(grad_first_ptr, at, inside)
        if SKIP:
            store_narrow(dskip_ptr, at, s1 * da, inside)
            ds0 += da * a
            ds1 += da * skip
            da = s0 * da
        dk0 += da * first
        dk1 += db * second
        if PARTED:
            store_narrow(dfirst_ptr, at, k0 * da, inside)
            store_narrow(dsecond_ptr, at, k1 * db, inside)
        else:
            store_narrow(dfirst_ptr, at, k0 * da + k1 * db, inside)
        if BRANCHES > 0:
            store_narrow(dattention_ptr, at, p00 * da + p01 * db, inside)
            dp00 += da * attention
            dp01 += db * attention
        if BRANCHES > 1:
            store_narrow(dmlp_ptr, at, p10 * da + p11 * db, inside)
            dp10 += da * mlp
            dp11 += db * mlp
    column = tl.arange(0, COLUMNS)
    partial_ptr += tl.program_id(0) * ((2 + 2 * SKIP) * columns + 6)
    tl.store(partial_ptr, total(dk0))
    tl.store(partial_ptr + 1, total(dk1))
    tl.store(partial_ptr + 2, total(dp00) if BRANCHES > 0 else 0.0)
    tl.store(partial_ptr + 3, total(dp01) if BRANCHES > 0 else 0.0)
    tl.store(partial_ptr + 4, total(dp10) if BRANCHES > 1 else 0.0)
    tl.store(partial_ptr + 5, total(dp11) if BRANCHES > 1 else 0.0)
    partial_ptr += 6
    tl.store(partial_ptr + column, tl.sum(dm0, 0), mask=column < columns)
    tl.store(partial_ptr + columns + column, tl.sum(dm1, 0), mask=column < columns)
    if SKIP:
        tl.store(partial_ptr + 2 * columns + column, tl.sum(ds0, 0), mask=column < columns)
        tl.store(partial_ptr + 3 * columns + column, tl.sum(ds1, 0), mask=column < columns)


def accepts(dtype: torch.dtype, columns: int) -> bool:
    """Whether the kernels compute this; the rest is for plain PyTorch."""
    return dtype != torch.float64 and columns <= MOST_COLUMNS


def launch(
    lanes: list[Tensor],  # one or two of (T, D), as branches, x0 and skip, all contiguous
    branches: list[Tensor],
    keep: Tensor,
    post: Tensor,
    x0: Tensor,
    mix: Tensor,
    skip: Tensor | None,
    skip_weights: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a', b, y_0, y_1), each (T, D)."""
    outs = tuple(torch.empty_like(x0) for _ in range(4))
    with torch.cuda.device_of(x0):
        two_lane_rms_norm_kernel[_grid(x0, backward=False)](
            *_inputs(lanes, branches, keep, post, x0, mix, skip, skip_weights), *outs, *x0.shape, scale, eps,
            **_flags(len(lanes), len(branches), skip is not None, x0.shape[1], _config(x0)),
        )  # fmt: skip
    return outs


def launch_backward(
    lanes: list[Tensor],
    branches: list[Tensor],
    keep: Tensor,
    post: Tensor,
    x0: Tensor,
    mix: Tensor,
    skip: Tensor | None,
    skip_weights: Tensor | None,
    upstream: list[Tensor],  # gradients of a', b, y_0, y_1, each (T, D) and contiguous
    scale: float,
    eps: float,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of lanes, branches, x0 and, if there is one, skip; those of all weights in float32, flat in a row:
    keep, post, mix, skip_weights.
    """
    dlanes, dbranches = [torch.empty_like(x) for x in lanes], [torch.empty_like(x) for x in branches]
    last = [torch.empty_like(x0) for _ in range(1 if skip is None else 2)]
    grid, columns = _grid(x0, backward=True), x0.shape[1]
    partial = x0.new_empty((*grid, SCALARS + 2 * len(last) * columns), dtype=torch.float32)
    with torch.cuda.device_of(x0):
        two_lane_rms_norm_backward_kernel[grid](
            *_inputs(lanes, branches, keep, post, x0, mix, skip, skip_weights), *upstream,
            *_padded(dlanes, x0), *_padded(dbranches, x0), *_padded(last, x0), partial,
            *x0.shape, scale, eps, **_flags(len(lanes), len(branches), skip is not None, columns, _config(x0)),
        )  # fmt: skip
    return [*dlanes, *dbranches, *last], partial.sum(0)


def _inputs(lanes, branches, keep, post, x0, mix, skip, skip_weights) -> list[Tensor]:
    skips = [x0, mix] if skip is None else [skip, skip_weights]
    return [*_padded(lanes, x0), *_padded(branches, x0), keep, post, x0, mix, *skips]


def _padded(tensors: list[Tensor], filler: Tensor) -> list[Tensor]:
    """Two tensors; those that the flags leave out are never touched."""
    return [*tensors, filler, filler][:2]


def _config(x: Tensor) -> RowLaunch:
    return launch_on(x.device, LAUNCHES, SAFE_LAUNCH)


def _grid(x: Tensor, backward: bool) -> tuple[int]:
    config = _config(x)
    return row_grid(x.device, x.shape[0], config.rows(x.shape[1]), config.resident[backward])


def _flags(lanes: int, branches: int, skip: bool, columns: int, config: RowLaunch) -> dict[str, int | bool]:
    return {
        "PARTED": lanes > 1,
        "BRANCHES": branches,
        "SKIP": skip,
        "ROWS": config.rows(columns),
        "COLUMNS": triton.next_power_of_2(columns),
        "STAGES": config.stages,
        "num_warps": config.num_warps,
    }


def _variant(lanes: int, skip: bool, backward: bool, rows: int = 98304, columns: int = 512) -> Variant:
    """Where they part one branch waits, that of the MLP; between two layers of two lanes there are two."""
    config, branches = LAUNCHES[90], lanes
    kernel = two_lane_rms_norm_backward_kernel if backward else two_lane_rms_norm_kernel
    constexprs = _flags(lanes, branches, skip, columns, config)
    num_warps = int(constexprs.pop("num_warps"))
    grid = row_grid_on_hopper(rows, config.rows(columns), config.resident[backward])
    inputs = lanes + branches + 1 + skip
    sums = 2 * 4 * grid * (SCALARS + (2 + 2 * skip) * columns) if backward else 0  # written, and read by the sum
    parts = ["route"] * (lanes > 1) + ["part"] * (lanes == 1) + ["skip"] * skip + ["mix"]
    return Variant(
        name=f"two_lane_rms_norm {' + '.join(parts)} {'backward' if backward else 'forward'} bf16 {rows}x{columns}",
        kernel=kernel,
        signature=signature(kernel, constexprs, partial_ptr="*fp32", scale="fp32", eps="fp32"),
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        programs=grid,
        bytes_moved=((2 if backward else 1) * inputs + 4) * rows * columns * 2 + (2 + 2 * skip) * columns * 2 + sums,
        flops=(28 + 8 * branches + 7 * skip if backward else 13 + 4 * branches + 3 * skip) * rows * columns,
        aligned=(*(name for name in kernel.arg_names if name.endswith("_ptr")), "columns"),
    )


FORMS = [(1, True), (2, True), (2, False)]
VARIANTS = [_variant(*form, backward) for form in FORMS for backward in (False, True)]
