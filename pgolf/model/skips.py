"""U-Net skips: outputs of the first half of the layers return, in reverse order, before those of the second half."""

from typing import NamedTuple

import torch
from torch import Tensor


class Skip(NamedTuple):
    """An earlier output that returns, and its parameters."""

    output: Tensor  # (rows, length, dim)
    weight: Tensor  # (dim,), begins at 1
    gate: Tensor | None  # (dim,), begins at 0; None without SKIP_GATES_ENABLED


def add_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """x + w skip (the baseline); with SKIP_GATES_ENABLED g x + (1 - g) w skip, g = σ(gate) (PRs #289, #1089).

    x and skip (rows, length, dim), weight and gate (dim,). The weight begins at 1, the gate at 0.
    """
    if gate is None:
        return x + weight * skip
    return torch.lerp(weight * skip, x, torch.sigmoid(gate))


def skip_weights(weight: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `add_skip` multiplies x and the skip with, (dim,) each."""
    if gate is None:
        return torch.ones_like(weight), weight
    kept = torch.sigmoid(gate)
    return kept, (1 - kept) * weight
