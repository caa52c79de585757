"""FlashAttention 3 and 4 and `torch.nn.attention.varlen`, each where it is installed. For CUDA, in float16 or bfloat16.

All take packed documents, (tokens, heads, head_dim) with cu_seqlens; rows of equal length are documents too.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), cu_seqlens (count + 1,), max_seqlen) -> like q
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _first(result: Any) -> Tensor:
    """Some versions also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def load_flash3() -> Packed:
    """Hopper's kernels, as built from flash-attention/hopper; since 2025-08 they stay in one graph by themselves."""
    function = importlib.import_module("flash_attn_interface").flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return _first(function(q, k, v, **_lengths(cu_seqlens, max_seqlen), causal=True))

    return attend


def load_flash4() -> Packed:
    """The CuTe kernels of `pip install flash-attn-4`, which torch.compile cannot trace: here they become operations."""
    interface = importlib.import_module("flash_attn.cute.interface")

    @torch.library.custom_op("pgolf::flash_attention_4", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        lengths = _lengths(cu_seqlens, max_seqlen)
        y, lse = interface._flash_attn_fwd(q, k, v, **lengths, causal=True, return_lse=True)[:2]
        return y, lse

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)

    @torch.library.custom_op("pgolf::flash_attention_4_backward", mutates_args=())
    def backward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths = _lengths(cu_seqlens, max_seqlen)
        dq, dk, dv = interface._flash_attn_bwd(q, k, v, y, gradient.contiguous(), lse, **lengths, causal=True)[:3]
        return dq, dk, dv

    @backward.register_fake
    def _(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple:
        return *backward(gradient, *ctx.saved_tensors, ctx.max_seqlen), None, None

    forward.register_autograd(differentiate, setup_context=keep)
    return lambda *arguments: forward(*arguments)[0]


def load_varlen() -> Packed:
    """torch's own, since 2.10. Its way of asking for a causal mask and for grouped heads differs by version.

    Versions without `enable_gqa` take fewer heads of k and v all the same: nothing of theirs counts heads, and
    FlashAttention 2 underneath divides the queries' heads among them. So nothing is expanded.
    """
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(function).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        grouped = k.size(1) != q.size(1)
        options = {**causal, "enable_gqa": True} if grouped and "enable_gqa" in known else causal
        return _first(function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options))

    return attend


def _lengths(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    both = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return {f"{name}_{side}": value for name, value in both.items() for side in "qk"}
