"""The FLOPs that training a model takes a token.

6 a weight of each matrix that a token is multiplied with, 2 forward and 4 backward, those of looped layers each time,
and the head's; and in each layer run, 12 · width for every token that attention looks back on, which is half a row on
average (PaLM, arXiv 2204.02311, appendix B, but for the causal half). Packed documents look back less than the row's
length says, so for them attention is counted at its most. Work element by element, the optimiser, and what a backward
pass computes again count nothing.
"""

from functools import lru_cache

from pgolf.model.config import ModelConfig


@lru_cache
def flops_per_token(config: ModelConfig, looping: bool, length: int, passes: int = 3) -> int:
    """In rows of `length` tokens; `passes`: 3 forward and backward, 1 forward alone."""
    attention = 2 * config.model_dim * length * len(config.visits(looping))
    return passes * (2 * config.weights_met(looping) + attention)
