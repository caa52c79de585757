"""Attention as matrix products, or by torch's scaled_dot_product_attention; packed documents are laid out as rows.

On CPUs the products are the faster for short rows: at 16 rows of 256 tokens with 4 heads of 64 in bfloat16 on two
cores, forward and backward took 25 ms, sdpa 60 ms. They hold the scores in memory, so `auto` gives rows past
`PLAIN_LENGTH` to sdpa.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_LENGTH = 512


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (rows, length, heads, head_dim), k and v (rows, length, kv_heads, head_dim) -> like q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, heads, length, head_dim = q.shape
    kv_heads = k.size(1)
    grouped = (q * head_dim**-0.5).reshape(rows, kv_heads, -1, head_dim)  # a group's queries one below the other
    scores = (grouped @ k.mT).view(rows, kv_heads, -1, length, length)
    future = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = (scores + future).softmax(dim=-1)
    return (weights.view(rows, kv_heads, -1, length) @ v).view(rows, heads, length, head_dim).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `plain`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def by_rows(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],  # `plain` or `sdpa`
    q: Tensor,  # (1, tokens, heads, head_dim)
    k: Tensor,  # (1, tokens, kv_heads, head_dim)
    v: Tensor,
    cu_seqlens: Tensor,  # (count + 1,)
    max_seqlen: int,
) -> Tensor:
    """Lay each document out as a row of `max_seqlen`, attend, and pack again.

    What fills a row up stands after its document, where nothing that counts can see it.
    """
    tokens = q.size(1)
    if not torch.compiler.is_compiling() and q.device.type == "cpu":  # where looking is free, no padding is computed
        lengths = cu_seqlens.diff()
        cu_seqlens = F.pad(lengths[lengths > 0].cumsum(0), (1, 0))
        max_seqlen = int(lengths.max())
    elif not torch.compiler.is_compiling() and (line := padding(cu_seqlens.numel() - 1, max_seqlen, tokens)):
        warnings.warn(f"pgolf: {line}", stacklevel=3)
    starts = cu_seqlens[:-1].long()
    index = (starts.unsqueeze(1) + torch.arange(max_seqlen, device=q.device)).clamp_(max=tokens - 1)
    y = attend(q[0][index], k[0][index], v[0][index])  # (documents, max_seqlen, heads, head_dim)
    token = torch.arange(tokens, device=q.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return y[document, token - starts[document]].unsqueeze(0)


def padding(documents: int, longest: int, tokens: int) -> str:
    """What it costs to lay `documents` (borders that cut off nothing count too) of `tokens` tokens in all out as rows
    of `longest`, in one line; "" where it is little.

    Known from shapes alone: nothing waits for the device, and a compiled step, which cannot warn, can be asked before.
    """
    padded = documents * longest
    if padded < 1.5 * tokens:
        return ""
    return (
        f"attention by sdpa pads packed documents to rows of {longest} tokens: {padded:,} tokens for {tokens:,} "
        f"({padded / tokens:.1f} times); ATTENTION=varlen (torch>=2.10, DTYPE=bfloat16) or flash3 pads nothing"
    )
