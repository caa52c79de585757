"""Gates on attention's output, one number a token and head, from a few channels of the layer's input.

    output gate    g = 2 σ(W x[:w])      PR #1667; x is the layer's normalised input, or its query
    sparse gate    g = σ(s W x[:w])      PR #1787; s is SPARSE_ATTN_GATE_SCALE

W (heads, w) begins at 0, w is GATE_WINDOW. The output gate begins at 1, the sparse gate at 1/2. Here are the logits;
`gate_heads` (ops/xsa_gate.py) applies them.
"""

import torch.nn.functional as F
from torch import Tensor


def gate_logits(source: Tensor, weight: Tensor) -> Tensor:
    """W source[:window]: source (rows, length, dim), weight (heads, window) -> (rows, length, heads)."""
    return F.linear(source[..., : weight.size(-1)], weight)


def gate_rows(weight: Tensor, query: Tensor | None, dim: int) -> Tensor:
    """W as factor of the layer's whole input, (..., heads, dim): its logits are then rows of a larger product.

    weight (..., heads, window); query (..., dim, dim) where W reads the query: W (Q x)[:w] = (W Q[:w]) x.
    """
    window = weight.size(-1)
    return F.pad(weight, (0, dim - window)) if query is None else weight @ query[..., :window, :]
