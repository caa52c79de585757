"""The residual stream: what a layer does to it, and its norm, which the layer's branches read.

`Stream` does each step at once, by the plain functions. `FusedStream` lets them wait until the norm is read and does
them and the norm in one pass (ops.residual_rms_norm). For that a skip and the mix with the embedding are one sum with
weights a channel: m_0 (g (x + branch) + (1 - g) w skip) + m_1 x_0.
"""

import torch
from torch import Tensor

from pgolf import ops
from pgolf.model.norm import norm
from pgolf.model.residual import mix_with_embedding
from pgolf.model.skips import add_skip


class Stream:
    def __init__(self, x: Tensor):  # (rows, length, dim)
        self.x = x
        self.stored: list[Tensor] = []  # for skips, the last one first

    def value(self) -> Tensor:
        return self.x

    def replace(self, x: Tensor) -> None:
        self.x = x

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

    def replace(self, x: Tensor) -> None:
        self._wait_for_nothing()
        self.x = x

    def add(self, branch: Tensor) -> None:
        if self.weights or self.storing:
            self.value()
        self.branch = branch if self.branch is None else self.branch + branch

    def store(self) -> None:
        self.storing = True

    def skip(self, weight: Tensor, gate: Tensor | None) -> None:
        if self.storing:  # in the middle, where what was stored last returns at once
            self.value()
        kept = torch.ones_like(weight) if gate is None else torch.sigmoid(gate)
        self._weigh(kept, weight if gate is None else (1 - kept) * weight, self.stored.pop())

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
