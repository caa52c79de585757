"""The gradient of a joined product's columns, queries, keys, values, extra and unused ones, in one pass.

Queries and keys as in qk_norm_rope.py, whose code this is; the gradients of the values' one or two readers are added,
those of the extra columns copied, the unused set to zero. Programs go over blocks of each part in turn. The forward
pass is that of qk_norm_rope.py, which reads queries and keys where they lie.

Floor for Q, K, V, E and U bytes of the parts: 3 (Q + K) + (READERS + 1) V + 2 E + U, and the tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.memory import load_wide, store_narrow
from pgolf.triton_kernels.qk_norm_rope import (
    LAUNCHES,
    SAFE_LAUNCH,
    backward_heads,
    gain_gradient,
    head_sizes,
    rows_of_block,
)
from pgolf.triton_kernels.row_launches import RowLaunch, launch_on, row_grid, row_grid_on_hopper
from pgolf.triton_kernels.variants import Variant, signature

JOINED = 2  # of RowLaunch.resident, behind the two kernels of qk_norm_rope.py


@triton.jit
def add_heads(
    first_ptr, second_ptr, out_ptr, tokens,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """first, or with BOTH first + second, [tokens, HEADS, DIM], into rows of STRIDE; zeros from DIM to WIDTH."""
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    for block in tl.range(
        tl.program_id(0), tl.cdiv(tokens, ROWS // HEADS_PADDED), tl.num_programs(0), num_stages=STAGES
    ):
        first, token, head, there = rows_of_block(block, tokens, HEADS, HEADS_PADDED, ROWS)
        block_at = first.to(tl.int64) * (HEADS * DIM)
        at = token * (HEADS * DIM) + head * DIM + column
        total = load_wide(first_ptr + block_at, at, there & (column < DIM))
        if BOTH:
            total += load_wide(second_ptr + block_at, at, there & (column < DIM))
        out_block_ptr = out_ptr + first.to(tl.int64) * STRIDE
        store_narrow(out_block_ptr, token * STRIDE + head * WIDTH + column, total, there & (column < WIDTH))


@triton.jit
def qkv_norm_rope_backward_kernel(
    q_ptr,  # floating [tokens, HEADS, DIM], Q_STRIDE from token to token
    k_ptr,  # floating [tokens, KV_HEADS, DIM], K_STRIDE
    cos_ptr,  # floating [table_rows, HALF]; token t reads row t % table_rows
    sin_ptr,
    gain_ptr,  # floating [HEADS]
    q_grad_ptr,  # floating [tokens, HEADS, DIM]
    k_grad_ptr,  # floating [tokens, KV_HEADS, DIM]
    v_grad_ptr,  # as k_grad
    v_grad_again_ptr,  # of the second reader, read with READERS 2
    extra_grad_ptr,  # floating [tokens, EXTRA]
    gradient_ptr,  # floating [tokens, COLUMNS]: of q, k, v, extra, unused
    partial_ptr,  # float32 [programs, ROWS]: a program's part of the gain's gradient, by row of the tile
    tokens,
    table_rows,
    eps,
    COLUMNS: tl.constexpr,
    EXTRA: tl.constexpr,
    LAST_PADDED: tl.constexpr,  # of the extra and unused columns
    LAST_ROWS: tl.constexpr,
    READERS: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF + REST
    K: tl.constexpr = HEADS * DIM
    V: tl.constexpr = K + KV_HEADS * DIM
    LAST: tl.constexpr = V + KV_HEADS * DIM
    backward_heads(
        q_ptr, q_grad_ptr, gradient_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, tokens, table_rows, eps,
        Q_STRIDE, COLUMNS, HEADS, HEADS_PADDED, True, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip
    backward_heads(
        k_ptr, k_grad_ptr, gradient_ptr + K, cos_ptr, sin_ptr, gain_ptr, partial_ptr, tokens, table_rows, eps,
        K_STRIDE, COLUMNS, KV_HEADS, KV_HEADS_PADDED, False, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip
    add_heads(
        v_grad_ptr, v_grad_again_ptr, gradient_ptr + V, tokens,
        COLUMNS, KV_HEADS, KV_HEADS_PADDED, DIM, DIM, DIM_PADDED, ROWS, STAGES, READERS == 2,
    )  # fmt: skip
    if COLUMNS > LAST:
        add_heads(
            extra_grad_ptr, extra_grad_ptr, gradient_ptr + LAST, tokens,
            COLUMNS, 1, 1, EXTRA, COLUMNS - LAST, LAST_PADDED, LAST_ROWS, STAGES, False,
        )  # fmt: skip


def launch_backward(
    q: Tensor,  # (T, heads, head_dim), a token's values contiguous
    k: Tensor,  # (T, kv_heads, head_dim), as q
    cos: Tensor,  # (rows, half), and all that follows contiguous
    sin: Tensor,
    gain: Tensor,  # (heads,)
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,  # as k_grad
    v_grad_again: Tensor,  # read for the second of 2 readers
    extra_grad: Tensor,  # (T, extra)
    readers: int,
    columns: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of all columns (T, columns), the gain's gradient in float32)."""
    config = launch_on(q.device, LAUNCHES, SAFE_LAUNCH)
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    strides = {"Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0)}
    normed = head_sizes(heads, kv_heads, head_dim, cos.shape[1], config)
    sizes = {**strides, **normed, **_column_sizes(columns, extra_grad.shape[1], readers, normed, config)}
    grid = row_grid(q.device, tokens * sizes["HEADS_PADDED"], sizes["ROWS"], config.resident[JOINED])
    gradient = q.new_empty(tokens, columns)
    partial = q.new_empty((grid[0], sizes["ROWS"]), dtype=torch.float32)
    with torch.cuda.device_of(q):
        qkv_norm_rope_backward_kernel[grid](
            q, k, cos, sin, gain, q_grad, k_grad, v_grad, v_grad_again, extra_grad, gradient, partial,
            tokens, cos.shape[0], eps, **sizes, num_warps=config.num_warps,
        )  # fmt: skip
    return gradient, gain_gradient(partial, sizes["HEADS_PADDED"], heads)


def _column_sizes(columns: int, extra: int, readers: int, normed: dict[str, int], config: RowLaunch) -> dict[str, int]:
    head_dim = 2 * normed["HALF"] + normed["REST"]
    last = triton.next_power_of_2(max(columns - (normed["HEADS"] + 2 * normed["KV_HEADS"]) * head_dim, 1))
    return {
        "COLUMNS": columns,
        "EXTRA": extra,
        "LAST_PADDED": last,
        "LAST_ROWS": config.rows(last),
        "READERS": readers,
        "DIM_PADDED": triton.next_power_of_2(head_dim),
    }


def _variant(half: int, readers: int, unused: int, extra: int, tokens: int = 98304) -> Variant:
    heads, kv_heads, head_dim = 8, 4, 64
    config, kernel = LAUNCHES[90], qkv_norm_rope_backward_kernel
    columns = (heads + 2 * kv_heads) * head_dim + extra + unused
    sizes = head_sizes(heads, kv_heads, head_dim, half, config)
    constexprs = {"Q_STRIDE": columns, "K_STRIDE": columns, **sizes}
    constexprs |= _column_sizes(columns, extra, readers, sizes, config)
    grid = row_grid_on_hopper(tokens * heads, constexprs["ROWS"], config.resident[JOINED])
    normed, values = tokens * (heads + kv_heads) * head_dim, tokens * kv_heads * head_dim
    moved = 3 * normed + (readers + 1) * values + tokens * (2 * extra + unused) + 2 * tokens * half
    sums = 2 * 4 * grid * constexprs["ROWS"]  # written, and read by the sum
    return Variant(
        name=f"qkv_norm_rope backward bf16 {tokens}x{columns}, {2 * half} rotate, values read by {readers}",
        kernel=kernel,
        signature=signature(kernel, constexprs, partial_ptr="*fp32", eps="fp32"),
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=3,
        programs=grid,
        bytes_moved=2 * moved + sums,
        flops=10 * normed + readers * values,
        aligned=tuple(name for name in kernel.arg_names if name.endswith("_ptr")),
    )


VARIANTS = [_variant(8, 2, 56, 8), _variant(8, 1, 0, 0), _variant(32, 2, 56, 8)]
