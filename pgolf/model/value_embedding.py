"""Value embeddings: the token's identity added to the values of some layers. As in PRs #374 and #1218."""

import torch.nn.functional as F
from torch import Tensor


def value_embeddings(
    tokens: Tensor,  # (rows, length) integer
    table: Tensor,  # (vocab_size, VE_DIM)
    projection: Tensor,  # (kv_dim, VE_DIM), begins at 0
    scale: Tensor,  # (1,), begins at 0.1
    layer_scales: Tensor,  # (layers,), begin at 1
) -> list[Tensor]:
    """scale · table[token] · projectionᵀ (rows, length, kv_dim), scaled once more for each layer of VE_LAYERS."""
    shared = scale * F.linear(F.embedding(tokens, table), projection)
    return [shared * layer_scale for layer_scale in layer_scales.unbind(0)]
