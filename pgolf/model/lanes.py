"""Two-lane parallel residuals (PR #1529): from a layer on the stream is two lanes.

Attention reads the first lane, to which skips and the embedding come, and the MLP the second; neither reads the other's
output. Both outputs go to both lanes, lane_i ← keep_i lane_i + post_{0i} attention + post_{1i} mlp, where the next
layer reads them. `keep` begins at 1.1, `post` at 1.

    part_lanes     before the first layer with two lanes, which both begin as the stream
    route_lanes    before each further one
    merge_lanes    before the head

each with two bodies as in residual.py. The fused ones are a call of ops.two_lane_rms_norm, of merge_lanes one of
ops.residual_rms_norm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pgolf import ops
from pgolf.model.residual import add_branch
from pgolf.model.skips import Skip, add_skip, skip_weights
from pgolf.ops.residual_rms_norm import norm, residual_rms_norm_reference
from pgolf.ops.two_lane_rms_norm import route_to_lanes

Lanes = tuple[Tensor, Tensor]  # (rows, length, dim) each
SHARES = {"mean": (0.5, 0.5), "attn": (1.0, 0.0), "mlp": (0.0, 1.0)}  # of either lane in what the head reads


class Routing(NamedTuple):
    """A layer's branches, and how they go to the lanes."""

    branches: list[Tensor]  # attention's and the MLP's, (rows, length, dim)
    keep: Tensor  # (2,)
    post: Tensor  # (2, 2): of either branch to either lane


def part_lanes(
    x: Tensor, branch: Tensor | None, skip: Skip | None, x0: Tensor, mix: Tensor, scale: float, fused: bool
) -> tuple[Lanes, Tensor, Tensor]:
    """The lanes, the norm of the first one mixed with the embedding, and the norm of the second."""
    if fused:
        whole = Routing([] if branch is None else [branch], x.new_ones(2), x.new_ones(2, 2))
        return _fused([x], whole, skip, x0, mix, scale)
    total = add_branch(x, branch)
    return _plain((total, total), skip, x0, mix, scale)


def route_lanes(
    lanes: Lanes, routing: Routing, skip: Skip | None, x0: Tensor, mix: Tensor, scale: float, fused: bool
) -> tuple[Lanes, Tensor, Tensor]:
    """The lanes with the branches of the layer before, and the norms as from `part_lanes`."""
    if fused:
        return _fused(list(lanes), routing, skip, x0, mix, scale)
    return _plain(route_to_lanes(lanes, *routing), skip, x0, mix, scale)


def merge_lanes(lanes: Lanes, routing: Routing, final_lane: str, fused: bool) -> Tensor:
    """The norm of the lanes' mean, or of the lane of `attn` or `mlp`, with the branches of the last layer."""
    if not fused:
        first, second = route_to_lanes(lanes, *routing)
        return norm(0.5 * (first + second) if final_lane == "mean" else (first, second)[SHARES[final_lane].index(1.0)])
    branches, keep, post = routing
    one, other = SHARES[final_lane]
    weights = [keep[0] * one, keep[1] * other, *(to[0] * one + to[1] * other for to in post)]
    by_channel = torch.stack(weights).unsqueeze(-1).expand(-1, lanes[0].size(-1))
    return ops.residual_rms_norm(lanes[0], None, [lanes[1], *branches], by_channel)[1]


def _plain(lanes: Lanes, skip: Skip | None, x0: Tensor, mix: Tensor, scale: float) -> tuple[Lanes, Tensor, Tensor]:
    first, second = lanes
    if skip is not None:
        first = add_skip(first, *skip)
    _, first_normed = residual_rms_norm_reference(first, None, [x0], mix, scale)
    return (first, second), first_normed, norm(second, scale)


def _fused(
    lanes: list[Tensor], routing: Routing, skip: Skip | None, x0: Tensor, mix: Tensor, scale: float
) -> tuple[Lanes, Tensor, Tensor]:
    output = None if skip is None else skip.output
    weights = None if skip is None else torch.stack(skip_weights(skip.weight, skip.gate))
    branches, keep, post = routing
    first, second, first_normed, second_normed = ops.two_lane_rms_norm(
        lanes, branches, keep, post, x0, mix, output, weights, scale
    )
    return (first, second), first_normed, second_normed
