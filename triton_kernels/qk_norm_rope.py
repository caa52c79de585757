"""Norm, rotation and gain of queries and keys, one pass over both; and the backward pass in another.

    n = x · r,  r = 1 / sqrt(mean(x²) + eps)        over a head
    (a, b, rest) = n,  out = gain · (a cos + b sin, b cos - a sin, rest)
    t = rotated back grad,  p = Σ t x:    dx = gain · r · (t - x · p r² / D),    dgain += p r

A tile is a few tokens of all heads, so that a row of it is the same head in every block of tokens: the gain's gradient
is one float32 number a row of the tile, kept in registers until the end. a, b and rest are loaded apart, which needs no
exchange between threads. A program goes over blocks of queries, then over blocks of keys, which have no gain. What is
read and, backward, written may lie in a wider row, with other parts of it between two tokens (qkv_norm_rope.py); the
strides are constants, so that the compiler knows what they are multiples of.

Floor for Q and K bytes of queries and keys: 2 (Q + K) forward, 3 (Q + K) backward, and the tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.memory import load_wide, store_narrow
from pgolf.triton_kernels.row_launches import RowLaunch, launch_on, row_grid, row_grid_on_hopper
from pgolf.triton_kernels.variants import Variant, signature

LARGEST_HEAD, MOST_HEADS = 256, 128
# Resident: of the two kernels here, and of that in qkv_norm_rope.py.
LAUNCHES = {90: RowLaunch(tile=2048, num_warps=4, resident=(8, 5, 4))}
SAFE_LAUNCH = RowLaunch(tile=2048, num_warps=4, resident=(4, 4, 4))


@triton.jit
def rows_of_block(block, tokens, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The block's first token, token after it and head of each row (ROWS, 1), and which of them there are."""
    i = tl.arange(0, ROWS)[:, None]
    first = block * (ROWS // HEADS_PADDED)
    token = i // HEADS_PADDED
    head = i % HEADS_PADDED
    return first, token, head, (first + token < tokens) & (head < HEADS)


@triton.jit
def load_head(x_ptr, at, there, HALF: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr):
    """The two halves of what rotates, and the rest."""
    pair = tl.arange(0, HALF)[None, :]
    last = tl.arange(0, REST_PADDED)[None, :]
    a = load_wide(x_ptr, at + pair, there)
    b = load_wide(x_ptr, at + HALF + pair, there)
    return a, b, load_wide(x_ptr, at + 2 * HALF + last, there & (last < REST))


@triton.jit
def store_head(out_ptr, at, a, b, rest, there, HALF: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr):
    pair = tl.arange(0, HALF)[None, :]
    last = tl.arange(0, REST_PADDED)[None, :]
    store_narrow(out_ptr, at + pair, a, there)
    store_narrow(out_ptr, at + HALF + pair, b, there)
    if REST > 0:
        store_narrow(out_ptr, at + 2 * HALF + last, rest, there & (last < REST))


@triton.jit
def forward_heads(
    x_ptr, out_ptr, cos_ptr, sin_ptr, gain_ptr, tokens, table_rows, eps,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, GAIN: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = 2 * HALF + REST
    pair = tl.arange(0, HALF)[None, :]
    for block in tl.range(
        tl.program_id(0), tl.cdiv(tokens, ROWS // HEADS_PADDED), tl.num_programs(0), num_stages=STAGES
    ):
        first, token, head, there = rows_of_block(block, tokens, HEADS, HEADS_PADDED, ROWS)
        x_block_ptr = x_ptr + first.to(tl.int64) * STRIDE
        out_block_ptr = out_ptr + first.to(tl.int64) * (HEADS * DIM)
        at = token * STRIDE + head * DIM
        out_at = token * (HEADS * DIM) + head * DIM
        a, b, rest = load_head(x_block_ptr, at, there, HALF, REST, REST_PADDED)
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        factor = (1.0 / tl.sqrt_rn(squares / DIM + eps))[:, None]
        if GAIN:
            factor *= load_wide(gain_ptr, head, there)
        turn = ((first + token) % table_rows) * HALF + pair
        cos = load_wide(cos_ptr, turn, there) * factor
        sin = load_wide(sin_ptr, turn, there) * factor
        store_head(
            out_block_ptr, out_at, a * cos + b * sin, b * cos - a * sin, rest * factor, there, HALF, REST, REST_PADDED
        )


@triton.jit
def backward_heads(
    x_ptr, grad_ptr, dx_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, tokens, table_rows, eps,
    STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, GAIN: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = 2 * HALF + REST
    pair = tl.arange(0, HALF)[None, :]
    dgain = tl.zeros((ROWS, 1), tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(tokens, ROWS // HEADS_PADDED), tl.num_programs(0), num_stages=STAGES
    ):
        first, token, head, there = rows_of_block(block, tokens, HEADS, HEADS_PADDED, ROWS)
        x_block_ptr = x_ptr + first.to(tl.int64) * STRIDE
        dx_block_ptr = dx_ptr + first.to(tl.int64) * DX_STRIDE
        grad_block_ptr = grad_ptr + first.to(tl.int64) * (HEADS * DIM)
        at = token * STRIDE + head * DIM
        dx_at = token * DX_STRIDE + head * DIM
        grad_at = token * (HEADS * DIM) + head * DIM
        a, b, rest = load_head(x_block_ptr, at, there, HALF, REST, REST_PADDED)
        ga, gb, t_rest = load_head(grad_block_ptr, grad_at, there, HALF, REST, REST_PADDED)
        turn = ((first + token) % table_rows) * HALF + pair
        cos = load_wide(cos_ptr, turn, there)
        sin = load_wide(sin_ptr, turn, there)
        ta = ga * cos - gb * sin
        tb = gb * cos + ga * sin
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        products = tl.sum(a * ta, 1) + tl.sum(b * tb, 1) + tl.sum(rest * t_rest, 1)
        inverse = (1.0 / tl.sqrt_rn(squares / DIM + eps))[:, None]
        along = products[:, None] * inverse
        factor = inverse
        if GAIN:
            factor *= load_wide(gain_ptr, head, there)
            dgain += along
        along = along * inverse / DIM
        store_head(
            dx_block_ptr, dx_at, (ta - a * along) * factor, (tb - b * along) * factor, (t_rest - rest * along) * factor,
            there, HALF, REST, REST_PADDED,
        )  # fmt: skip
    if GAIN:
        tl.store(partial_ptr + tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], dgain)


@triton.jit
def qk_norm_rope_kernel(
    q_ptr,  # floating [tokens, HEADS, DIM], Q_STRIDE from token to token
    k_ptr,  # floating [tokens, KV_HEADS, DIM], K_STRIDE
    cos_ptr,  # floating [table_rows, HALF]; token t reads row t % table_rows
    sin_ptr,
    gain_ptr,  # floating [HEADS]
    q_out_ptr,
    k_out_ptr,
    tokens,
    table_rows,
    eps,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,  # a power of 2
    KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,  # a power of 2
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # a multiple of both padded numbers of heads
    STAGES: tl.constexpr,
):
    forward_heads(
        q_ptr, q_out_ptr, cos_ptr, sin_ptr, gain_ptr, tokens, table_rows, eps,
        Q_STRIDE, HEADS, HEADS_PADDED, True, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip
    forward_heads(
        k_ptr, k_out_ptr, cos_ptr, sin_ptr, gain_ptr, tokens, table_rows, eps,
        K_STRIDE, KV_HEADS, KV_HEADS_PADDED, False, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip


@triton.jit
def qk_norm_rope_backward_kernel(
    q_ptr,  # as in the forward kernel
    k_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    q_grad_ptr,
    k_grad_ptr,
    dq_ptr,  # as the outputs of the forward kernel
    dk_ptr,
    partial_ptr,  # float32 [programs, ROWS]: a program's part of the gain's gradient, by row of the tile
    tokens,
    table_rows,
    eps,
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
    backward_heads(
        q_ptr, q_grad_ptr, dq_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, tokens, table_rows, eps,
        Q_STRIDE, HEADS * (2 * HALF + REST), HEADS, HEADS_PADDED, True, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip
    backward_heads(
        k_ptr, k_grad_ptr, dk_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, tokens, table_rows, eps,
        K_STRIDE, KV_HEADS * (2 * HALF + REST), KV_HEADS, KV_HEADS_PADDED, False, HALF, REST, REST_PADDED, ROWS, STAGES,
    )  # fmt: skip


def accepts(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, half: int) -> bool:
    """Whether the kernels compute this; the rest is for plain PyTorch."""
    sizes = head_dim <= LARGEST_HEAD and max(heads, kv_heads) <= MOST_HEADS
    return dtype != torch.float64 and sizes and half == triton.next_power_of_2(half)


def launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """q (T, heads, head_dim), k (T, kv_heads, head_dim), tables (rows, half), gain (heads,), contiguous but for T."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    with torch.cuda.device_of(q):
        qk_norm_rope_kernel[_grid(q, k, backward=False)](
            q, k, cos, sin, gain, q_out, k_out, q.shape[0], cos.shape[0], eps, **_sizes(q, k, cos)
        )
    return q_out, k_out


def launch_backward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, q_grad: Tensor, k_grad: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, the gain's gradient in float32)."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    grid, sizes = _grid(q, k, backward=True), _sizes(q, k, cos)
    partial = q.new_empty((grid[0], sizes["ROWS"]), dtype=torch.float32)
    with torch.cuda.device_of(q):
        qk_norm_rope_backward_kernel[grid](
            q, k, cos, sin, gain, q_grad, k_grad, dq, dk, partial, q.shape[0], cos.shape[0], eps, **sizes
        )
    return dq, dk, gain_gradient(partial, sizes["HEADS_PADDED"], q.shape[1])


def gain_gradient(partial: Tensor, heads_padded: int, heads: int) -> Tensor:
    return partial.view(-1, heads_padded).sum(0)[:heads]


def _config(x: Tensor) -> RowLaunch:
    return launch_on(x.device, LAUNCHES, SAFE_LAUNCH)


def _grid(q: Tensor, k: Tensor, backward: bool) -> tuple[int]:
    config, heads = _config(q), triton.next_power_of_2(q.shape[1])
    block_rows = head_sizes(q.shape[1], k.shape[1], q.shape[2], 1, config)["ROWS"]
    return row_grid(q.device, q.shape[0] * heads, block_rows, config.resident[backward])


def _sizes(q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    config = _config(q)
    sizes = head_sizes(q.shape[1], k.shape[1], q.shape[2], cos.shape[1], config)
    return {"Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0), **sizes, "num_warps": config.num_warps}


def head_sizes(heads: int, kv_heads: int, head_dim: int, half: int, config: RowLaunch) -> dict[str, int]:
    padded, kv_padded, rest = triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads), head_dim - 2 * half
    return {
        "HEADS": heads,
        "HEADS_PADDED": padded,
        "KV_HEADS": kv_heads,
        "KV_HEADS_PADDED": kv_padded,
        "HALF": half,
        "REST": rest,
        "REST_PADDED": triton.next_power_of_2(max(rest, 1)),
        "ROWS": max(config.rows(head_dim), padded, kv_padded),
        "STAGES": config.stages,
    }


def _variant(
    backward: bool, half: int, columns: int | None = None, tokens: int = 98304, length: int = 98304
) -> Variant:
    heads, kv_heads, head_dim = 8, 4, 64
    config = LAUNCHES[90]
    kernel = qk_norm_rope_backward_kernel if backward else qk_norm_rope_kernel
    strides = {"Q_STRIDE": columns or heads * head_dim, "K_STRIDE": columns or kv_heads * head_dim}
    constexprs = {**strides, **head_sizes(heads, kv_heads, head_dim, half, config)}
    grid = row_grid_on_hopper(tokens * heads, constexprs["ROWS"], config.resident[backward])
    values = tokens * (heads + kv_heads) * head_dim
    sums = 2 * 4 * grid * constexprs["ROWS"] if backward else 0  # written, and read by the sum
    return Variant(
        name=f"qk_norm_rope {'backward' if backward else 'forward'} bf16 {tokens}x({heads}+{kv_heads})x{head_dim}, "
        f"{2 * half} rotate{f', of {columns} columns' if columns else ''}",
        kernel=kernel,
        signature=signature(kernel, constexprs, partial_ptr="*fp32", eps="fp32"),
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=3,
        programs=grid,
        bytes_moved=(3 if backward else 2) * values * 2 + 2 * length * half * 2 + sums,
        flops=(10 if backward else 5) * values,
        aligned=tuple(name for name in kernel.arg_names if name.endswith("_ptr")),
    )


VARIANTS = [_variant(backward, half) for half in (8, 32) for backward in (False, True)]
VARIANTS += [_variant(False, half, columns=1088) for half in (8, 32)]
