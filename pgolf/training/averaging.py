"""Averages of the weights over training, which become the weights at its end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pgolf.runtime.machine import SideStream
from pgolf.settings import Settings
from pgolf.training.schedule import lr_scale


class Average:
    """Base: an average of parameters beside them. On CUDA it is updated while the next forward pass runs; call `join`
    before the parameters change."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = [p.detach() for p in parameters]
        self.average = [p.clone() for p in self.parameters]
        self.updates = 0
        self.side = SideStream(self.parameters[0].device)

    def update(self, step: int, used: float) -> None:
        """After step number `step`, with the fraction `used` of the budget."""
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

    def update(self, step: int, used: float) -> None:
        self._move(1.0 - min(self.decay, (self.updates + 1) / (self.updates + 10.0)))


class Swa(Average):
    """Stochastic weight averaging (Izmailov 2018): the plain mean of the weights after every SWA_EVERY-th step from
    when the learning rate has fallen to SWA_START_FRAC."""

    def __init__(self, parameters: Iterable[Tensor], settings: Settings):
        super().__init__(parameters)
        self.settings = settings

    def update(self, step: int, used: float) -> None:
        if step % self.settings.swa_every == 0 and lr_scale(self.settings, used) <= self.settings.swa_start_frac:
            self._move(1.0 / (self.updates + 1))


def make_average(parameters: Iterable[Tensor], settings: Settings) -> Average | None:
    if settings.ema_decay:
        return Ema(parameters, settings.ema_decay)
    return Swa(parameters, settings) if settings.swa_every else None
