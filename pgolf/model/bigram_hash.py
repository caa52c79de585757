"""Bigram hash embedding: a small table looked up by this token and the one before it. PRs #162, #1019."""

import torch.nn.functional as F
from torch import Tensor

# The multipliers of the entries' scripts; any two odd numbers of this size scatter as well.
THIS, BEFORE = 36_313, 27_191


def bigram_buckets(tokens: Tensor, starts: Tensor, buckets: int) -> Tensor:
    """(THIS t_i xor BEFORE t_{i-1}) mod (buckets - 1); the last bucket is for tokens with no token before them.

    tokens (rows, length) integer, starts (rows or 1, length) bool -> (rows, length) int64.
    """
    tokens = tokens.long()
    mixed = (THIS * tokens).bitwise_xor(BEFORE * F.pad(tokens[:, :-1], (1, 0)))
    return (mixed % (buckets - 1)).masked_fill(starts, buckets - 1)


def bigram_embedding(buckets: Tensor, table: Tensor, projection: Tensor, scale: Tensor) -> Tensor:
    """scale · table[bucket] · projectionᵀ: buckets (rows, length), table (buckets, BIGRAM_DIM), projection (dim,
    BIGRAM_DIM) -> (rows, length, dim). Table and projection begin small and at 0, the scale at 0.05."""
    return scale * F.linear(F.embedding(buckets, table), projection)
