"""Exclusive self-attention (XSA): attention's output without its part along the token's own value. PRs #265, #478."""

import torch.nn.functional as F
from torch import Tensor


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """y_h - (y_h · u) u with u = v_g / |v_g|, for each query head h and its group's value head g; no parameters.

    y (rows, length, heads, head_dim), v (rows, length, kv_heads, head_dim). A group is a dimension: v is not repeated.
    """
    grouped = y.unflatten(-2, (v.size(-2), -1))  # (rows, length, kv_heads, heads / kv_heads, head_dim)
    direction = F.normalize(v, dim=-1).unsqueeze(-2)
    return (grouped - (grouped * direction).sum(dim=-1, keepdim=True) * direction).flatten(-3, -2)
