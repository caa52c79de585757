"""Exclusive self-attention and the gate a head, in one pass over attention's output; the backward pass in another.

    u = v / max(|v|, eps),  o = y - (y·u) u,  g = gain · σ(logit_scale · logit),  out = g o       a token and query head
    e = g grad:  dy = e - (e·u) u,   du = -Σ_heads ((y·u) e + (e·u) y),   dlogit = (grad·o) gain logit_scale σ (1 - σ)
    dv = (du - u (u·du)) / |v|

A row is a token and value head; its query heads are taken one after the other while the row of v stays in registers, so
v is read once and the sum over its query heads is a plain addition. v and logits may be columns of a wider tensor.

Floor for Y and V bytes of attention's output and of the values: 2 Y + V forward, 3 Y + 2 V backward, and the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.memory import load_wide, store_narrow
from pgolf.triton_kernels.row_launches import RowLaunch, launch_on
from pgolf.triton_kernels.variants import Variant, signature

LARGEST_HEAD = 512
EPSILON = 1e-12  # of torch's normalize
LAUNCHES = {90: RowLaunch(tile=2048, num_warps=4)}
SAFE_LAUNCH = RowLaunch(tile=2048, num_warps=4)


@triton.jit
def load_direction(
    v_ptr, rows, V_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of this program (ROWS, 1), its columns and what is inside, u and |v|."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, DIM_PADDED)[None, :]
    inside = (row < rows) & (column < DIM)
    v = load_wide(v_ptr, row // KV_HEADS * V_STRIDE + row % KV_HEADS * DIM + column, inside)
    length = tl.sqrt_rn(tl.sum(v * v, 1))[:, None]
    return row, column, inside, v / tl.maximum(length, 1e-12), length


@triton.jit
def xsa_gate_kernel(
    y_ptr,  # floating [rows, GROUP, DIM]: tokens and value heads, query heads of each
    v_ptr,  # floating [rows, DIM], V_STRIDE from token to token
    logits_ptr,  # floating [rows, GROUP], LOGITS_STRIDE from token to token; read with GATE
    out_ptr,  # as y
    rows,
    gain,
    logit_scale,
    GATE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, inside, u, _ = load_direction(v_ptr, rows, V_STRIDE, KV_HEADS, DIM, DIM_PADDED, ROWS)
    for head in tl.static_range(GROUP):
        at = (row * GROUP + head) * DIM + column
        y = load_wide(y_ptr, at, inside)
        out = y - tl.sum(y * u, 1)[:, None] * u
        if GATE:
            logit_at = row // KV_HEADS * LOGITS_STRIDE + row % KV_HEADS * GROUP + head
            out *= gain * tl.sigmoid(logit_scale * load_wide(logits_ptr, logit_at, row < rows))
        store_narrow(out_ptr, at, out, inside)


@triton.jit
def xsa_gate_backward_kernel(
    y_ptr,  # as in the forward kernel
    v_ptr,
    logits_ptr,
    grad_ptr,  # as y
    dy_ptr,
    dv_ptr,
    dlogits_ptr,  # floating [rows, GROUP], written with GATE
    rows,
    gain,
    logit_scale,
    GATE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, inside, u, length = load_direction(v_ptr, rows, V_STRIDE, KV_HEADS, DIM, DIM_PADDED, ROWS)
    du = tl.zeros((ROWS, DIM_PADDED), tl.float32)
    for head in tl.static_range(GROUP):
        at = (row * GROUP + head) * DIM + column
        y = load_wide(y_ptr, at, inside)
        e = load_wide(grad_ptr, at, inside)
        along = tl.sum(y * u, 1)[:, None]
        if GATE:
            logit_at = row // KV_HEADS * LOGITS_STRIDE + row % KV_HEADS * GROUP + head
            sigmoid = tl.sigmoid(logit_scale * load_wide(logits_ptr, logit_at, row < rows))
            dgate = tl.sum(e * (y - along * u), 1)[:, None]
            dlogit = dgate * gain * logit_scale * sigmoid * (1.0 - sigmoid)
            store_narrow(dlogits_ptr, row * GROUP + head, dlogit, row < rows)
            e *= gain * sigmoid
        e_along = tl.sum(e * u, 1)[:, None]
        store_narrow(dy_ptr, at, e - e_along * u, inside)
        du -= along * e + e_along * y
    # Below eps the length is a constant.
    outward = tl.where(length > 1e-12, tl.sum(du * u, 1)[:, None], 0.0)
    store_narrow(dv_ptr, row * DIM + column, (du - outward * u) / tl.maximum(length, 1e-12), inside)


def accepts(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether the kernels compute this; the rest is for plain PyTorch."""
    return dtype != torch.float64 and head_dim <= LARGEST_HEAD and group <= 16


def launch(y: Tensor, v: Tensor, logits: Tensor | None, gain: float, logit_scale: float) -> Tensor:
    """y (T, heads, head_dim), v (T, kv_heads, head_dim), logits (T, heads); of v and logits each token contiguous."""
    out = torch.empty_like(y)
    with torch.cuda.device_of(y):
        xsa_gate_kernel[_grid(v)](
            y, v, y if logits is None else logits, out, v.shape[0] * v.shape[1], gain, logit_scale,
            GATE=logits is not None, **_sizes(y, v, logits),
        )  # fmt: skip
    return out


def launch_backward(
    y: Tensor, v: Tensor, logits: Tensor | None, grad: Tensor, gain: float, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dy, dv, dlogits)."""
    dy, dv = torch.empty_like(y), v.new_empty(v.shape)
    dlogits = None if logits is None else logits.new_empty(logits.shape)
    with torch.cuda.device_of(y):
        xsa_gate_backward_kernel[_grid(v)](
            y, v, y if logits is None else logits, grad, dy, dv, dy if dlogits is None else dlogits,
            v.shape[0] * v.shape[1], gain, logit_scale,
            GATE=logits is not None, **_sizes(y, v, logits),
        )  # fmt: skip
    return dy, dv, dlogits


def _config(x: Tensor) -> RowLaunch:
    return launch_on(x.device, LAUNCHES, SAFE_LAUNCH)


def _grid(v: Tensor) -> tuple[int]:
    return (triton.cdiv(v.shape[0] * v.shape[1], _config(v).rows(v.shape[2])),)


def _sizes(y: Tensor, v: Tensor, logits: Tensor | None) -> dict[str, int]:
    config = _config(y)
    strides = {"V_STRIDE": v.stride(0), "LOGITS_STRIDE": 0 if logits is None else logits.stride(0)}
    return {**strides, **_constexprs(y.shape[1], v.shape[1], y.shape[2], config), "num_warps": config.num_warps}


def _constexprs(heads: int, kv_heads: int, head_dim: int, config: RowLaunch) -> dict[str, int]:
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": head_dim,
        "DIM_PADDED": triton.next_power_of_2(head_dim),
        "ROWS": config.rows(head_dim),
    }


def _variant(gate: bool, backward: bool, columns: int | None = None, tokens: int = 98304) -> Variant:
    heads, kv_heads, head_dim = 8, 4, 64
    config = LAUNCHES[90]
    kernel = xsa_gate_backward_kernel if backward else xsa_gate_kernel
    strides = {"V_STRIDE": columns or kv_heads * head_dim, "LOGITS_STRIDE": columns or heads}
    constexprs = {"GATE": gate, **strides, **_constexprs(heads, kv_heads, head_dim, config)}
    y, v, logits = tokens * heads * head_dim, tokens * kv_heads * head_dim, tokens * heads if gate else 0
    moved = 3 * y + 2 * v + 2 * logits if backward else 2 * y + v + logits
    return Variant(
        name=f"xsa_gate {'backward' if backward else 'forward'}{'' if gate else ' without gate'} bf16 "
        f"{tokens}x{heads}x{head_dim}, {kv_heads} values{f', of {columns} columns' if columns else ''}",
        kernel=kernel,
        signature=signature(kernel, constexprs, gain="fp32", logit_scale="fp32"),
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=3,
        programs=triton.cdiv(tokens * kv_heads, constexprs["ROWS"]),
        bytes_moved=2 * moved,
        flops=(16 if backward else 6) * y,
        aligned=tuple(name for name in kernel.arg_names if name.endswith("_ptr")),
    )


VARIANTS = [_variant(gate, backward) for gate in (True, False) for backward in (False, True)]
VARIANTS += [_variant(True, backward, columns=1088) for backward in (False, True)]
