"""Averages of the weights over training, which become the weights at its end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pgolf.runtime.machine import SideStream


class Average:
    """Base: an average of parameters beside them. On CUDA it is updated while the next forward pass runs; call `join`
    before the parameters change."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = [p.detach() for p in parameters]
        self.average = [p.clone() for p in self.parameters]
        self.updates = 0
        self.side = SideStream(self.parameters[0].device)

    def update(self, step: int, lr_scale: float) -> None:
        """After step number `step`, which was taken at the fraction `lr_scale` of the learning rate."""
        raise NotImplementedError

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        """Towards the parameters, by `weight` of the distance."""
        self.updates += 1
        with self.side.beside():
            torch._foreach_lerp_(self.average, self.parameters, weight)

    def join(self) -> None:
        self.side.join()

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Nothing changes where nothing was averaged."""
        self.join()
        if self.updates:
            torch._foreach_copy_(self.parameters, self.average)

    def state_dict(self) -> dict[str, Any]:
        self.join()
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
        self.updates = state["updates"]


class Ema(Average):
    """Exponential moving average; young averages forget faster, so that the start leaves no trace."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        super().__init__(parameters)
        self.decay = decay

    def update(self, step: int, lr_scale: float) -> None:
        self._move(1.0 - min(self.decay, (self.updates + 1) / (self.updates + 10.0)))


class Swa(Average):
    """Stochastic weight averaging (Izmailov 2018): the plain mean of the weights after every `every`-th step from
    when the learning rate has fallen to the fraction `start_frac` of itself."""

    def __init__(self, parameters: Iterable[Tensor], every: int, start_frac: float):
        super().__init__(parameters)
        self.every, self.start_frac = every, start_frac

    def update(self, step: int, lr_scale: float) -> None:
        if step % self.every == 0 and lr_scale <= self.start_frac:
            self._move(1.0 / (self.updates + 1))


def make_average(
    parameters: Iterable[Tensor], *, ema_decay: float, swa_every: int, swa_start_frac: float
) -> Average | None:
    if ema_decay:
        return Ema(parameters, ema_decay)
    return Swa(parameters, swa_every, swa_start_frac) if swa_every else None
