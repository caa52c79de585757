"""The logits' soft-cap, c tanh(z / c); and the asymmetric one, with a cap for each sign. PR #1923.

Both caps begin at LOGIT_SOFTCAP and only test-time training moves them. While they are equal the loss is that of
`ops.softcapped_cross_entropy`; whoever moves them sets `Model.caps_differ`.
"""

import torch
from torch import Tensor


def softcap(z: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(z / cap)


def asymmetric_softcap(z: Tensor, caps: Tensor) -> Tensor:
    """z (..., vocab_size), caps (2,): for z ≥ 0 and for z < 0."""
    cap = torch.where(z >= 0, caps[0], caps[1])
    return cap * torch.tanh(z / cap)
