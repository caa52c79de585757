"""Rows of the embedding table, SmearGate and RMSNorm, in one pass over tokens; the backward pass in another.

    e_t = table[token_t],   p_t = e_{t-1}, zero where a document or a row of the batch starts,   σ_t = sigmoid(w · e_t)
    s_t = e_t + λ σ_t p_t,   y_t = s_t r_t,   r_t = 1 / sqrt(mean(s_t²) + eps)
    d_t = r_t (grad_t - s_t r_t² mean(s_t · grad_t)),   z_t = (d_t · p_t) λ σ_t (1 - σ_t)
    grad e_t = d_t + z_t w + λ σ_{t+1} d_{t+1}, the last term unless t + 1 starts
    dw = Σ z_t e_t,   dλ = Σ σ_t d_t · p_t

The table stays in the L2 cache, so rows are gathered anew wherever they are needed, and d is computed twice, for a
token and for the one before it, in place of a pass of its own. The gradient leaves token by token; the caller adds it
up by row of the table.

Floor for X bytes of results: X forward, 2 X backward, and the table once each.
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
# The assertion is compiled in with `debug`, which by itself would also check every addition of integers.
OPTIONS = {"debug": True, "sanitize_overflow": False}
LAUNCHES = {90: RowLaunch(tile=1024, num_warps=4, resident=(8, 5))}
SAFE_LAUNCH = RowLaunch(tile=1024, num_warps=4, resident=(4, 4))


@triton.jit
def smear_rows(
    tokens_ptr, table_ptr, starts_ptr, w, strength, row, column, rows, columns, vocabulary, length, starts_count
):  # fmt: skip
    """Of `row` (ROWS, 1): e, p, whether p is the token before, σ, and s."""
    there = row < rows
    token = tl.load(tokens_ptr + row, mask=there, other=0).to(tl.int64)
    tl.device_assert((token >= 0) & (token < vocabulary), "embedding_smear_norm: a token is outside 0..V-1")
    smears = there & (row % length != 0)
    smears = smears & (tl.load(starts_ptr + row % starts_count, mask=there, other=1) == 0)
    previous = tl.load(tokens_ptr + row - 1, mask=smears, other=0).to(tl.int64)
    e = load_wide(table_ptr, token * columns + column, there & (column < columns))
    p = load_wide(table_ptr, previous * columns + column, smears & (column < columns))
    sigmoid = tl.sigmoid(tl.sum(w * e, 1))[:, None]
    return e, p, smears, sigmoid, e + strength * sigmoid * p


@triton.jit
def embedding_smear_norm_kernel(
    tokens_ptr,  # integer [rows]
    table_ptr,  # floating [vocabulary, columns]
    weight_ptr,  # floating [window]
    strength_ptr,  # floating [1]
    starts_ptr,  # uint8 [starts_count]; token t reads t % starts_count
    out_ptr,  # as the table, [rows, columns]
    rows,
    columns,
    vocabulary,
    window,
    length,  # of a row of the batch
    starts_count,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of 2, at least columns
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    w = load_wide(weight_ptr, column, column < window)
    strength = tl.load(strength_ptr).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        _, _, _, _, s = smear_rows(
            tokens_ptr, table_ptr, starts_ptr, w, strength, row, column, rows, columns, vocabulary, length, starts_count
        )
        at = row.to(tl.int64) * columns + column
        store_narrow(out_ptr, at, s * inverse_rms(s, columns, eps), (row < rows) & (column < columns))


@triton.jit
def embedding_smear_norm_backward_kernel(
    tokens_ptr,  # as in the forward kernel
    table_ptr,
    weight_ptr,
    strength_ptr,
    starts_ptr,
    grad_ptr,  # as the result
    drows_ptr,  # as the result: the gradient of each token's row of the table
    partial_ptr,  # float32 [programs, window + 1]: a program's part of the gradients of w and λ
    rows,
    columns,
    vocabulary,
    window,
    length,
    starts_count,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    w = load_wide(weight_ptr, column, column < window)
    strength = tl.load(strength_ptr).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    dstrength = tl.zeros((ROWS, 1), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        _, _, smears, sigmoid, s = smear_rows(
            tokens_ptr, table_ptr, starts_ptr, w, strength, row + 1, column,
            rows, columns, vocabulary, length, starts_count,
        )  # fmt: skip
        at = row.to(tl.int64) * columns + column
        g = load_wide(grad_ptr, at + columns, smears & (column < columns))
        handed_back = tl.where(smears, strength * sigmoid, 0.0) * norm_gradient(s, g, columns, eps, 1.0)
        e, p, _, sigmoid, s = smear_rows(
            tokens_ptr, table_ptr, starts_ptr, w, strength, row, column, rows, columns, vocabulary, length, starts_count
        )
        inside = (row < rows) & (column < columns)
        d = norm_gradient(s, load_wide(grad_ptr, at, inside), columns, eps, 1.0)
        dgate = tl.sum(d * p, 1)[:, None]
        dlogit = dgate * strength * sigmoid * (1.0 - sigmoid)
        store_narrow(drows_ptr, at, d + dlogit * w + handed_back, inside)
        dw += dlogit * e
        dstrength += dgate * sigmoid
    partial_ptr += tl.program_id(0) * (window + 1)
    column = tl.arange(0, COLUMNS)
    tl.store(partial_ptr + column, tl.sum(dw, 0), mask=column < window)
    tl.store(partial_ptr + window, tl.sum(tl.sum(dstrength, 1), 0))


def accepts(dtype: torch.dtype, columns: int) -> bool:
    """Whether the kernels compute this; the rest is for plain PyTorch."""
    return dtype != torch.float64 and columns <= MOST_COLUMNS


def launch(
    tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor, length: int, eps: float
) -> Tensor:
    """tokens (T,), table (V, D), weight (w,), strength (1,), starts (T or length,) bool, all contiguous -> (T, D)."""
    out = table.new_empty((tokens.numel(), table.shape[1]))
    with torch.cuda.device_of(table):
        embedding_smear_norm_kernel[_grid(tokens, table, backward=False)](
            tokens, table, weight, strength, starts.view(torch.uint8), out, *_sizes(tokens, table, weight),
            length, starts.numel(), eps, **_constexprs(table.shape[1], _config(table)), **_options(table),
        )  # fmt: skip
    return out


def launch_backward(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    strength: Tensor,
    starts: Tensor,
    grad: Tensor,  # (T, D)
    length: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the gathered rows (T, D), and of weight and strength, float32 (w + 1,)."""
    drows, grid = torch.empty_like(grad), _grid(tokens, table, backward=True)
    partial = table.new_empty((*grid, weight.numel() + 1), dtype=torch.float32)
    with torch.cuda.device_of(table):
        embedding_smear_norm_backward_kernel[grid](
            tokens, table, weight, strength, starts.view(torch.uint8), grad, drows, partial,
            *_sizes(tokens, table, weight), length, starts.numel(), eps,
            **_constexprs(table.shape[1], _config(table)), **_options(table),
        )  # fmt: skip
    return drows, partial.sum(0)


def _config(x: Tensor) -> RowLaunch:
    return launch_on(x.device, LAUNCHES, SAFE_LAUNCH)


def _grid(tokens: Tensor, table: Tensor, backward: bool) -> tuple[int]:
    config = _config(table)
    return row_grid(table.device, tokens.numel(), config.rows(table.shape[1]), config.resident[backward])


def _sizes(tokens: Tensor, table: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    """rows, columns, vocabulary, window."""
    return tokens.numel(), table.shape[1], table.shape[0], weight.numel()


def _constexprs(columns: int, config: RowLaunch) -> dict[str, int]:
    return {"ROWS": config.rows(columns), "COLUMNS": triton.next_power_of_2(columns), "STAGES": config.stages}


def _options(x: Tensor) -> dict[str, int | bool]:
    return {"num_warps": _config(x).num_warps, **OPTIONS}


def _variant(backward: bool, rows: int = 98304, vocabulary: int = 8192, columns: int = 512) -> Variant:
    config, window = LAUNCHES[90], 12
    kernel = embedding_smear_norm_backward_kernel if backward else embedding_smear_norm_kernel
    constexprs = _constexprs(columns, config)
    grid = row_grid_on_hopper(rows, constexprs["ROWS"], config.resident[backward])
    types = {"tokens_ptr": "*i64", "starts_ptr": "*u8", "partial_ptr": "*fp32", "eps": "fp32"}
    sums = 2 * 4 * grid * (window + 1) if backward else 0  # written, and read by the sum
    return Variant(
        name=f"embedding_smear_norm {'backward' if backward else 'forward'} bf16 {rows} of {vocabulary}x{columns}",
        kernel=kernel,
        signature=signature(kernel, constexprs, **types),
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=3,
        programs=grid,
        bytes_moved=((2 if backward else 1) * rows + vocabulary) * columns * 2 + rows * 9 + sums,
        flops=(30 if backward else 8) * rows * columns,
        aligned=(*(name for name in kernel.arg_names if name.endswith("_ptr")), "columns"),
        debug=True,
    )


VARIANTS = [_variant(backward) for backward in (False, True)]
