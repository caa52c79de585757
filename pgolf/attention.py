"""Causal attention behind one function. Today's backend is torch's scaled_dot_product_attention."""

import torch.nn.functional as F
from torch import Tensor

BACKEND = "sdpa"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (rows, length, heads, head_dim), k and v (rows, length, kv_heads, head_dim) -> like q.

    Each group of heads / kv_heads query heads shares a key and value head. Scores are scaled by head_dim ** -0.5.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
