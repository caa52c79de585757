"""The residual stream: what a layer does to it, and its norm, which the layer's branches read; and its two lanes.

`Stream` and `Lanes` do each step at once, by the plain functions. `FusedStream` and `FusedLanes` let them wait until a
norm is read and do them and the norm in one pass (ops.residual_rms_norm, ops.two_lane_rms_norm). For that a skip and
the mix with the embedding are one sum with weights a channel: m_0 (g (x + branch) + (1 - g) w skip) + m_1 x_0.
"""

import torch
from torch import Tensor

from pgolf import ops
from pgolf.model.norm import norm
from pgolf.model.residual import SHARES, merge_lanes, mix_with_embedding, route_to_lanes
from pgolf.model.skips import add_skip, skip_weights


class Stream:
    def __init__(self, x: Tensor):  # (rows, length, dim)
        self.x = x
        self.stored: list[Tensor] = []  # for skips, the last one first

    def value(self) -> Tensor:
        return self.x

    def parts(self) -> list[Tensor]:
        """What the value is the sum of."""
        return [self.value()]

    def add(self, branch: Tensor) -> None:
        self.x = self.x + branch

    def store(self) -> None:
        self.stored.append(self.x)

    def skip(self, weight: Tensor, gate: Tensor | None) -> None:
        self.x = add_skip(self.x, self.stored.pop(), weight, gate)

    def mix(self, x0: Tensor, mix: Tensor) -> None:
        self.x = mix_with_embedding(self.x, x0, mix)

    def norm(self, scale: float = 1.0) -> Tensor:
        return norm(self.x, scale)


class FusedStream(Stream):
    """`branch`, `weights` and `others` are what waits: m = Σ weights_i ⊙ (x + branch, *others)_i."""

    branch: Tensor | None
    storing: bool
    weights: list[Tensor]  # (dim,) each
    others: list[Tensor]

    def __init__(self, x: Tensor):
        super().__init__(x)
        self._wait_for_nothing()

    def value(self) -> Tensor:
        if self.branch is not None:
            self.x = self.x + self.branch
        if self.storing:
            self.stored.append(self.x)
        if self.weights:
            own, *weights = self.weights
            terms = (weight * other for weight, other in zip(weights, self.others, strict=True))
            self.x = sum(terms, start=own * self.x)
        self._wait_for_nothing()
        return self.x

    def parts(self) -> list[Tensor]:
        if self.weights or self.storing or self.branch is None:
            return super().parts()
        return [self.x, self.branch]

    def add(self, branch: Tensor) -> None:
        if self.weights or self.storing:
            self.value()
        self.branch = branch if self.branch is None else self.branch + branch

    def store(self) -> None:
        self.storing = True

    def skip(self, weight: Tensor, gate: Tensor | None) -> None:
        if self.storing:  # in the middle, where what was stored last returns at once
            self.value()
        self._weigh(*skip_weights(weight, gate), self.stored.pop())

    def mix(self, x0: Tensor, mix: Tensor) -> None:
        self._weigh(mix[0], mix[1], x0)

    def norm(self, scale: float = 1.0) -> Tensor:
        weights = torch.stack(self.weights) if self.weights else None
        total, self.x, normed = ops.residual_sum_rms_norm(
            self.x, self.branch, self.others, weights, scale, keep_sum=self.storing
        )
        if self.storing:
            self.stored.append(total)
        self._wait_for_nothing()
        return normed

    def _weigh(self, own: Tensor, weight: Tensor, other: Tensor) -> None:
        self.weights = [*([own * earlier for earlier in self.weights] or [own]), weight]
        self.others.append(other)

    def _wait_for_nothing(self) -> None:
        self.branch, self.storing, self.weights, self.others = None, False, [], []


class Lanes:
    """Two lanes (residual.py), of which attention reads the first and the MLP the second, from a stream on."""

    def __init__(self, stream: Stream):
        self.stored = stream.stored
        self.first = self.second = stream.value()

    def skip(self, weight: Tensor, gate: Tensor | None) -> None:
        self.first = add_skip(self.first, self.stored.pop(), weight, gate)

    def norms(self, x0: Tensor, mix: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Of the first lane mixed with the embedding, and of the second."""
        return norm(mix_with_embedding(self.first, x0, mix), scale), norm(self.second, scale)

    def route(self, attention: Tensor, mlp: Tensor, keep: Tensor, post: Tensor) -> None:
        self.first, self.second = route_to_lanes((self.first, self.second), attention, mlp, keep, post)

    def merged_norm(self, final_lane: str) -> Tensor:
        return norm(merge_lanes((self.first, self.second), final_lane))


class FusedLanes(Lanes):
    """`branches` with their `keep` and `post`, and the skip, wait. The last norm is that of ops.residual_rms_norm."""

    def __init__(self, stream: Stream):
        first, *self.branches = stream.parts()
        self.stored, self.lanes = stream.stored, [first]
        self.keep, self.post = first.new_ones(2), first.new_ones(2, 2)
        self.skipped: Tensor | None = None
        self.skip_weights: Tensor | None = None  # (2, dim)

    def skip(self, weight: Tensor, gate: Tensor | None) -> None:
        self.skipped, self.skip_weights = self.stored.pop(), torch.stack(skip_weights(weight, gate))

    def norms(self, x0: Tensor, mix: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        *self.lanes, h, of_second = ops.two_lane_rms_norm(
            self.lanes, self.branches, self.keep, self.post, x0, mix, self.skipped, self.skip_weights, scale
        )
        self.branches, self.skipped, self.skip_weights = [], None, None
        return h, of_second

    def route(self, attention: Tensor, mlp: Tensor, keep: Tensor, post: Tensor) -> None:
        self.branches, self.keep, self.post = [attention, mlp], keep, post

    def merged_norm(self, final_lane: str) -> Tensor:
        x, *others = self.lanes + self.branches
        one, other = SHARES[final_lane]
        weights = [self.keep[0] * one, self.keep[1] * other, *(to[0] * one + to[1] * other for to in self.post)]
        by_channel = torch.stack(weights).unsqueeze(-1).expand(-1, x.size(-1))
        return ops.residual_rms_norm(x, None, others, by_channel)[1]
