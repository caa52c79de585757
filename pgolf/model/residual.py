"""The residual stream on its way from one branch of the model to the next.

A branch is not added where it ends, but where the next one reads the stream, so the stream travels as two tensors,
x + branch. Between them lie

    add_mix_norm    before a layer: add the branch, take in a skip, mix with the embedding, norm
    add_norm        between attention and MLP, and before the head: add the branch, norm

each with two bodies: the definitions in that order, and one call of an operation (`fused`). For that call a skip and
the mix with the embedding are one sum with weights by channel: m_0 (g u + (1 - g) w skip) + m_1 x_0.
"""

import torch
from torch import Tensor

from pgolf import ops
from pgolf.model.skips import Skip, add_skip, skip_weights
from pgolf.ops.residual_rms_norm import residual_rms_norm_reference


def add_branch(x: Tensor, branch: Tensor | None) -> Tensor:
    """The stream as one tensor, where nothing reads its norm."""
    return x if branch is None else x + branch


def add_mix_norm(
    x: Tensor,  # (rows, length, dim), as branch, the skip and x0
    branch: Tensor | None,
    skip: Skip | None,
    x0: Tensor,  # the normalised embedding
    mix: Tensor,  # (2, dim), begins at (1, 0)
    scale: float,
    fused: bool,
    keep_sum: bool,  # whether u is asked for; else the first result may be anything
) -> tuple[Tensor, Tensor, Tensor]:
    """u = x + branch, the stream m = mix_0 (u with the skip) + mix_1 x_0, and its norm."""
    if fused:
        own, of_x0 = mix[0], mix[1]
        streams, weights = [x0], [own, of_x0]
        if skip is not None:
            kept, added = skip_weights(skip.weight, skip.gate)
            streams, weights = [skip.output, x0], [own * kept, own * added, of_x0]
        return ops.residual_sum_rms_norm(x, branch, streams, torch.stack(weights), scale, keep_sum)
    total = add_branch(x, branch)
    skipped = total if skip is None else add_skip(total, *skip)
    return total, *residual_rms_norm_reference(skipped, None, [x0], mix, scale)


def add_norm(x: Tensor, branch: Tensor | None, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
    """The stream x + branch and its norm."""
    return (ops.residual_rms_norm if fused else residual_rms_norm_reference)(x, branch, scale=scale)
