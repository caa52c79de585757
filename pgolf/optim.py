"""Optimisers: Muon on banks of matrices, AdamW on everything else, and the moving average of the weights.

Muon (K. Jordan, 2024): a momentum buffer a matrix, its update replaced by the nearest semi-orthogonal matrix, found by
Newton-Schulz iteration. Here a parameter is a bank (count, rows, columns) and the iteration runs on the whole bank.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pgolf import ops
from pgolf.model import Model
from pgolf.settings import Settings


class Muon(torch.optim.Optimizer):
    """Muon for 3-D parameters (count, rows, columns), each matrix of a bank on its own.

    update = newton_schulz(nesterov momentum), times sqrt(max(1, rows / columns)); weights decay by lr * weight_decay.
    With `row_normalize`, every row of the momentum is brought to unit length first (MuonEq-R, arXiv 2603.28254).
    Every rank holds the same averaged gradient and does the same step.
    """

    def __init__(
        self,
        banks: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        coefficients: str = "polar_express",
        row_normalize: bool = False,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        banks = list(banks)
        for bank in banks:
            if bank.ndim != 3:
                raise ValueError(f"Muon takes banks (count, rows, columns); a parameter has shape {tuple(bank.shape)}")
        super().__init__(
            banks,
            {
                "lr": lr,
                "momentum": momentum,
                "steps": steps,
                "coefficients": coefficients,
                "row_normalize": row_normalize,
                "weight_decay": weight_decay,
            },
        )
        self.dtype = dtype  # of the iteration

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for bank in group["params"]:
                if bank.grad is None:
                    continue
                state = self.state[bank]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(bank)
                buffer = state["momentum_buffer"]
                buffer.mul_(momentum).add_(bank.grad)
                update = bank.grad.add(buffer, alpha=momentum)
                if group["row_normalize"]:
                    update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                update = ops.newton_schulz(update.to(self.dtype), group["coefficients"], group["steps"])
                scale = math.sqrt(max(1.0, bank.size(-2) / bank.size(-1)))
                bank.mul_(1.0 - lr * group["weight_decay"]).add_(update.to(bank.dtype), alpha=-lr * scale)


class Ema:
    """Exponential moving average of parameters; young averages forget faster, so that the start leaves no trace."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9.0))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def make_optimisers(model: Model, settings: Settings) -> list[torch.optim.Optimizer]:
    """[Muon on the banks, AdamW on embedding and small parameters]; every group remembers its `base_lr`."""
    named = dict(model.named_parameters())
    banks = [p for name, p in named.items() if name.endswith("_bank")]
    small = [p for name, p in named.items() if name != "embedding" and not name.endswith("_bank")]
    muon = Muon(
        banks,
        lr=settings.matrix_lr,
        momentum=settings.muon_momentum,
        steps=settings.muon_backend_steps,
        coefficients=settings.muon_coefficients,
        row_normalize=settings.muon_row_normalize,
        weight_decay=settings.muon_weight_decay,
        dtype=model.dtype,
    )
    adam = torch.optim.AdamW(
        [
            {"params": [named["embedding"]], "lr": settings.tied_embed_lr},
            {"params": small, "lr": settings.scalar_lr, "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
        weight_decay=settings.adam_weight_decay,
        fused=True,
    )
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]
