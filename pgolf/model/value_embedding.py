"""Value embeddings: the token's identity added to the values of some layers. As in PRs #374 and #1218."""

import torch.nn.functional as F
from torch import Tensor


def value_embedding(tokens: Tensor, table: Tensor, projection: Tensor, scale: Tensor) -> Tensor:
    """scale · table[token] · projectionᵀ, shared by the layers of VE_LAYERS, each of which scales it once more.

    tokens (rows, length), table (vocab_size, VE_DIM), projection (kv_dim, VE_DIM) -> (rows, length, kv_dim). The
    projection begins at 0, the scale at 0.1, the layers' scales at 1.
    """
    return scale * F.linear(F.embedding(tokens, table), projection)
