"""Rotary position embedding of the first dimensions of each head, and its stretching to longer contexts.

    angle(p, i) = p · f_i,   f_i = base^(-2 i / d),   i = 0 … d/2 - 1,   d = ROPE_DIMS (0: the whole head)

Dimensions i and i + d/2 are a pair and turn by angle(p, i); the rest of the head, if any, has no position (PR #315).
Documents longer than ROPE_TRAIN_SEQ_LEN = L by a factor s are read, with ROPE_SCALING,

    ntk     with base · s^(d / (d - 2)), as by the entries' scripts: the lowest f is divided by s, the highest kept
    yarn    with f_i · (γ_i + (1 - γ_i) / s), γ_i rising from 0 to 1 as pair i makes 1 to 32 turns in L, and q · k
            multiplied by (0.1 ln s + 1)² (arXiv 2309.00071, sections 3.2 to 3.4)
"""

import math

import torch
from torch import Tensor

FEWEST_TURNS, MOST_TURNS = 1.0, 32.0  # YaRN's alpha and beta


def rotary_tables(
    positions: Tensor,  # (length,) integer, of each token in its document
    dims: int,
    base: float,
    dtype: torch.dtype,
    scaling: str = "none",
    stretch: float = 1.0,  # s: the longest document over the length trained at, at least 1
    train_length: int = 1,
) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, dims / 2) each, computed in float32."""
    if scaling == "ntk" and stretch > 1.0 and dims > 2:
        base = base * stretch ** (dims / (dims - 2))
    exponent = torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device) / dims
    frequency = 1.0 / base**exponent
    if scaling == "yarn" and stretch > 1.0:
        turns = train_length * frequency / (2 * math.pi)
        kept = ((turns - FEWEST_TURNS) / (MOST_TURNS - FEWEST_TURNS)).clamp(0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / stretch)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def score_scale(scaling: str, stretch: float) -> float:
    """What q is to be multiplied by: YaRN sharpens attention over long contexts."""
    return (0.1 * math.log(stretch) + 1.0) ** 2 if scaling == "yarn" and stretch > 1.0 else 1.0
