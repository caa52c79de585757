"""One optimiser step over all ranks: Muon on banks of matrices, AdamW on everything else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf.model import Model, role_of
from pgolf.runtime.machine import SideStream
from pgolf.runtime.ranks import Pending, Ranks
from pgolf.settings import Settings
from pgolf.training.checkpoint import check_tensors
from pgolf.training.muon import ALONE, Muon

__all__ = ["Muon", "OptimiserConfig", "Optimisers", "make_optimisers"]


@dataclass(frozen=True)
class OptimiserConfig:
    matrix_lr: float  # Muon's
    muon_momentum: float
    muon_steps: int  # of Newton-Schulz
    muon_coefficients: str
    muon_row_normalize: bool
    muon_weight_decay: float
    muon_beta2: float
    muon_renormalize: str
    late_layer: int  # Split-LR: from this layer on,
    late_lr_mult: float  # matrices learn at so many times `matrix_lr`
    embedding_lr: float  # AdamW's
    embedding_weight_decay: float
    small_lr: float  # AdamW's, of the small parameters
    small_weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_norm: float  # of all gradients; 0: any

    @classmethod
    def of(cls, settings: Settings) -> "OptimiserConfig":
        s = settings
        return cls(
            matrix_lr=s.matrix_lr,
            muon_momentum=s.muon_momentum,
            muon_steps=s.muon_backend_steps,
            muon_coefficients=s.muon_coefficients,
            muon_row_normalize=s.muon_row_normalize,
            muon_weight_decay=s.muon_weight_decay,
            muon_beta2=s.muon_beta2,
            muon_renormalize=s.muon_renormalize,
            late_layer=s.muon_late_layer,
            late_lr_mult=s.muon_late_lr_mult,
            embedding_lr=s.tied_embed_lr,
            embedding_weight_decay=s.embed_weight_decay,
            small_lr=s.scalar_lr,
            small_weight_decay=s.adam_weight_decay,
            betas=(s.beta1, s.beta2),
            eps=s.adam_eps,
            clip_norm=s.grad_clip_norm,
        )


class Optimisers:
    """Muon and AdamW as one step with nothing idle. The ranks' gradients add up.

    All communication is begun before any of it is waited for. On CUDA AdamW runs on a stream of its own, beside Muon's
    communication, and nothing waits for the device.
    """

    def __init__(self, muon: Muon, adam: torch.optim.Optimizer, clip_norm: float = 0.0):
        self.muon, self.adam, self.clip_norm, self.ranks = muon, adam, clip_norm, muon.ranks
        self.small = [p for group in adam.param_groups for p in group["params"]]
        self.base_lr = [[group["lr"] for group in optimiser.param_groups] for optimiser in (muon, adam)]
        self.side = SideStream(self.small[0].device)
        self.packed: Tensor | None = None

    def set_rates(self, lr_scale: float, momentum: float) -> None:
        """Learning rates as a fraction of those given at the start, and Muon's momentum."""
        for optimiser, rates in zip((self.muon, self.adam), self.base_lr, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * lr_scale
        self.muon.param_groups[0]["momentum"] = momentum

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Sum gradients and `loss`, a scalar, over ranks; clip; update; drop the gradients. Returns the summed loss."""
        self.muon.begin_step()
        small, loss, summing = self._begin_small(loss)
        if self.clip_norm:
            summing.wait()
            self._clip(self.muon.own_gradients(), small)
        with self.side.beside():
            summing.wait()
            self.adam.step()
        self.muon.step()
        self.side.join()  # before gradients are freed, for others on this stream to overwrite
        for optimiser in (self.muon, self.adam):
            optimiser.zero_grad(set_to_none=True)
        return loss.clone()

    def _begin_small(self, loss: Tensor) -> tuple[list[Tensor], Tensor, Pending]:
        """Sum the gradients of AdamW's parameters, and the loss, in one message. They become views of its buffer."""
        owners = [p for p in self.small if p.grad is not None]
        gradients = [p.grad for p in owners if p.grad is not None]
        if self.ranks.world_size == 1:
            return gradients, loss, Pending(0)
        if self.packed is None:
            self.packed = gradients[0].new_empty(sum(p.numel() for p in self.small) + 1)
        sizes = [gradient.numel() for gradient in gradients]
        used = self.packed[: sum(sizes) + 1]
        *parts, last = used.split([*sizes, 1])
        views = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_([*views, last], [*gradients, loss.reshape(1)])
        for p, view in zip(owners, views, strict=True):
            p.grad = view
        return views, last.squeeze(0), self.ranks.begin_sum(used)

    def _clip(self, own: list[Tensor], small: list[Tensor]) -> None:
        """As torch.nn.utils.clip_grad_norm_ over all gradients, of which this rank has its own matrices and all small
        ones; one number travels."""
        squares = torch.stack(torch._foreach_norm(own)).square().sum()
        self.ranks.begin_sum(squares).wait()
        norm = (squares + torch.stack(torch._foreach_norm(small)).square().sum()).sqrt()
        torch._foreach_mul_([*own, *small], (self.clip_norm / (norm + 1e-6)).clamp_(max=1.0))

    def reset(self) -> None:
        """As if no step had been taken."""
        self.muon.reset()
        self.adam.state.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Of both. All ranks must call it; all get the same."""
        return [self.muon.state_dict(), self.adam.state_dict()]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Momenta and the like; rates and other settings stay as they are. `ValueError` for what does not fit."""
        if len(state) != 2 or not all(isinstance(saved.get("state"), dict) for saved in state):
            raise ValueError("optimisers: expected the states of Muon and AdamW")
        muon, adam = (saved["state"] for saved in state)
        if muon:  # {} before the first step, in checkpoints of a plain torch optimiser
            self.muon.check_state(muon)
        for index, found in adam.items():
            self._check_adam(index, found)
        for optimiser, saved in zip((self.muon, self.adam), (muon, adam), strict=True):
            groups = torch.optim.Optimizer.state_dict(optimiser)["param_groups"]
            optimiser.load_state_dict({"state": saved, "param_groups": groups})

    def _check_adam(self, index: Any, found: Any) -> None:
        if index not in range(len(self.small)) or not isinstance(found, dict):
            raise ValueError(f"AdamW: no parameter {index}")
        p = self.small[index]
        name = f"AdamW's parameter {index}"
        check_tensors(name, found, {"step": torch.empty(()), "exp_avg": p, "exp_avg_sq": p})
        if bool((found["exp_avg_sq"] < 0).any()) or float(found["step"]) < 0:
            raise ValueError(f"{name}: negative where it cannot be")


def lr_multipliers(banks: Iterable[Tensor], num_layers: int, late_layer: int, late_lr_mult: float) -> list[Tensor]:
    """Split-LR: layers from `late_layer` on move at `late_lr_mult` times the rate. A bank holds all layers once, or
    twice one after the other."""
    result = []
    for bank in banks:
        layers = torch.arange(len(bank)) % num_layers
        result.append(torch.where(layers >= late_layer, late_lr_mult, 1.0))
    return result


def make_optimisers(model: Model, config: OptimiserConfig, ranks: Ranks = ALONE, compiled: bool = False) -> Optimisers:
    """Muon on the banks, AdamW on embeddings and small parameters."""
    named = dict(model.named_parameters())
    banks = {name: p for name, p in named.items() if name.endswith("_bank")}
    embeddings = [p for name, p in named.items() if role_of(name) == "embedding"]
    small = [p for name, p in named.items() if role_of(name) == "control"]
    muon = Muon(
        banks.values(),
        lr=config.matrix_lr,
        momentum=config.muon_momentum,
        steps=config.muon_steps,
        coefficients=config.muon_coefficients,
        row_normalize=config.muon_row_normalize,
        weight_decay=config.muon_weight_decay,
        dtype=model.execution.dtype,
        beta2=config.muon_beta2,
        renormalize=config.muon_renormalize,
        lr_multipliers=lr_multipliers(banks.values(), model.config.num_layers, config.late_layer, config.late_lr_mult),
        ranks=ranks,
        compiled=compiled,
    )
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": config.embedding_lr, "weight_decay": config.embedding_weight_decay},
            {"params": small, "lr": config.small_lr, "weight_decay": config.small_weight_decay},
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    return Optimisers(muon, adam, config.clip_norm)
