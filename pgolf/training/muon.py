"""Muon: each matrix moves along the orthogonalised Nesterov momentum of its gradient.

On several ranks each matrix has one owner (pgolf/training/sharding.py), which alone keeps its momentum. Gradients reach
the owners by reduce-scatter, costliest shape first; while the next shape is orthogonalised, the updates of the last
travel to all ranks, in the dtype of the iteration, so that every rank adds the same bits. The ranks' gradients add up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pgolf import ops
from pgolf.runtime.ranks import Pending, Ranks
from pgolf.training.checkpoint import check_tensors
from pgolf.training.sharding import Exchange, Part, Plan, as_bank

ALONE = Ranks(0, 1, torch.device("cpu"))
RENORMALIZE = {"none": (), "row": (-1,), "column": (-2,), "row_column": (-1, -2), "column_row": (-2, -1)}


class Muon(torch.optim.Optimizer):
    """Muon for matrices (rows, columns) and banks of them (count, rows, columns), each matrix on its own.

    One step, for gradient G and rate lr:

        B ← momentum B + G,  U = G + momentum B
        U ← rows of U at unit length                              with `row_normalize`: MuonEq-R
        O = newton_schulz(U)
        O ← O with unit rows and/or columns                       with `renormalize`: Muon+
        v ← beta2 v + (1 - beta2) mean over columns of O²         with `beta2`: NorMuon
        O ← O / (√v + 1e-8)
        W ← (1 - lr m weight_decay) W - lr m √max(1, rows / columns) O

    m is the matrix's learning-rate multiplier. After the options O is brought back to the Frobenius norm it had, so
    that one learning rate serves with and without them. Matrices of one shape are orthogonalised together. Embeddings,
    the output layer and whatever is no matrix belong to another optimiser, AdamW, say. Schedulers may change `lr` and
    `momentum` of `param_groups[0]` between steps. With several ranks every rank must call `step`, `state_dict` and
    `load_state_dict`.

    Args:
        params: (rows, columns) or (count, rows, columns), of one floating dtype on one device, as nn.Linear.weight;
            each needs a gradient at every step.
        lr: learning rate: a square matrix's step has singular values near it.
        momentum: 0 to less than 1.
        steps: of Newton-Schulz.
        coefficients: of Newton-Schulz, as `ops.newton_schulz` takes them.
        row_normalize: rows at unit length before Newton-Schulz.
        weight_decay: decoupled, a step, in units of lr.
        dtype: in which Newton-Schulz iterates and updates travel between ranks.
        beta2: decay of the running mean of squares; 0: none is kept.
        renormalize: "none", "row", "column", "row_column" or "column_row": what is brought to one length, in that
            order.
        lr_multipliers: for each parameter a number, or a floating tensor (count,) for its matrices; None: 1.
        ranks: this process among those that share the work, whose gradients are summed; by default it is alone, as
            under DDP, which has averaged them already.
        compiled: fuse what is done element by element; lr and momentum may change without compiling anew.
    Raises:
        TypeError: what is no tensor; groups (dicts) among them: one Muon has one group.
        ValueError: a parameter that is no matrix and no bank (1-D, 4-D), or of another dtype; an option not named
            above.
        RuntimeError: at a step, a parameter without a gradient; it is named.
    Example:
        >>> import torch
        >>> from pgolf.training.muon import Muon
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> others = [p for p in model.parameters() if p.ndim != 2]
        >>> optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.001)]
        >>> model(torch.randn(8, 16)).square().mean().backward()
        >>> for optimiser in optimisers:
        ...     optimiser.step()
        ...     optimiser.zero_grad()
        >>> [tuple(state["momentum_buffer"].shape) for state in optimisers[0].state_dict()["state"].values()]
        [(64, 16), (16, 64)]

    Sources: K. Jordan, kellerjordan.github.io/posts/muon; MuonEq, arXiv 2603.28254; Muon+, arXiv 2602.21545; NorMuon,
    arXiv 2510.05491.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        coefficients: str = "polar_express",
        row_normalize: bool = False,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        beta2: float = 0.0,
        renormalize: str = "none",
        lr_multipliers: Sequence[float | Tensor] | None = None,
        ranks: Ranks = ALONE,
        compiled: bool = False,
    ):
        self.banks = list(params)
        _check(self.banks)
        if renormalize not in RENORMALIZE:
            raise ValueError(f"renormalize: {renormalize!r} is not accepted; expected {', '.join(RENORMALIZE)}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "steps": steps,
            "coefficients": coefficients,
            "row_normalize": row_normalize,
            "weight_decay": weight_decay,
            "beta2": beta2,
            "renormalize": renormalize,
        }
        super().__init__(self.banks, defaults)
        self.dtype, self.ranks = dtype, ranks  # dtype of the iteration
        self.multipliers = _multipliers(self.banks, lr_multipliers)
        self._scattering: list[Pending] | None = None
        self._compiled = compiled
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._add_momentum, self._move = wrap(_add_momentum), wrap(_move)

    @cached_property
    def exchange(self) -> Exchange:
        return Exchange(self.banks, self.ranks, self.param_groups[0]["steps"], self.dtype)

    @cached_property
    def momentum(self) -> Part:
        plan, rank = self.exchange.plan, self.ranks.rank
        return Part(plan, rank, self.banks[0].detach().new_zeros(plan.ends[rank][-1]))

    @cached_property
    def variance(self) -> Part:
        shapes, rank = [tuple(as_bank(bank).shape) for bank in self.banks], self.ranks.rank
        plan = Plan(shapes, self.ranks.world_size, self.param_groups[0]["steps"], columns=1)  # type: ignore[arg-type]
        return Part(plan, rank, self.banks[0].detach().new_zeros(plan.ends[rank][-1]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the constructor alone: all matrices are planned together, so one Muon has one group."""
        if self.param_groups:
            raise ValueError("Muon: one Muon has one group of parameters; make another Muon for more")
        super().add_param_group(param_group)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Send the gradients on their way; may be called before `step`, as soon as all parameters have one."""
        for index, bank in enumerate(self.banks):
            if bank.grad is None:
                raise RuntimeError(
                    f"Muon: parameter {index} of {len(self.banks)}, {tuple(bank.shape)}, has no gradient; all "
                    "take part in a step"
                )
        self._scattering = self.exchange.begin_scatter()

    def own_gradients(self) -> list[Tensor]:
        """After `begin_step`: the summed gradients of this rank's matrices, to be measured or scaled in place."""
        for pending in self._scattering or ():
            pending.wait()
        if self.ranks.world_size == 1:
            return [bank.grad for bank in self.banks if bank.grad is not None]
        return [self.exchange.gradients.data[: len(self.momentum.data)]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter, after `begin_step` or alone. Returns what `closure`, called first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._scattering is None:
            self.begin_step()
        scattering, self._scattering = self._scattering or [], None
        gathering: list[Pending] = []
        for batch in range(len(self.exchange.plan.batches)):
            if scattering:
                scattering[batch].wait()
            self._orthogonalise(batch)
            gathering.append(self.exchange.begin_gather(batch))
            if batch:
                self._move_banks(batch - 1, gathering)
        self._move_banks(len(gathering) - 1, gathering)
        return loss

    def _orthogonalise(self, batch: int) -> None:
        group = self.param_groups[0]
        for gradient, momentum, update in self.exchange.parts(batch, self.momentum):
            self._add_momentum(gradient, momentum, update, self._scalar(group["momentum"]), group["row_normalize"])
        update = self.exchange.updates.batch(batch)
        if not len(update):
            return
        ops.newton_schulz(update, group["coefficients"], group["steps"], out=update)
        if group["renormalize"] != "none":
            update.copy_(_renormalized(update, RENORMALIZE[group["renormalize"]]))
        if group["beta2"]:
            update.copy_(_variance_reduced(update, self.variance.batch(batch), group["beta2"]))

    def _move_banks(self, segment: int, gathering: list[Pending]) -> None:
        """Those whose updates are complete with this segment."""
        group = self.param_groups[0]
        gathering[segment].wait()
        lr = self._scalar(group["lr"])
        for index, update in self.exchange.unpack(segment):
            self._move(as_bank(self.banks[index]), update, lr, self.multipliers[index], group["weight_decay"])

    def _scalar(self, number: float) -> float | Tensor:
        """For compiled code a 0-D tensor on the host: a changing number would be compiled again and again."""
        return torch.tensor(number, dtype=torch.float64) if self._compiled else number

    def _state(self) -> dict[str, Part]:
        variance = {"variance": self.variance} if self.param_groups[0]["beta2"] else {}
        return {"momentum_buffer": self.momentum, **variance}

    @torch.no_grad()
    def reset(self) -> None:
        """As if no step had been taken."""
        for part in self._state().values():
            part.data.zero_()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Momentum, and variance, of whole parameters: the same on every rank and at every number of ranks."""
        whole = {name: part.whole(self.ranks) for name, part in self._state().items()}
        for banks in whole.values():
            banks[:] = [bank.view(bank.shape[3 - p.ndim :]) for bank, p in zip(banks, self.banks, strict=True)]
        indices = list(range(len(self.banks)))
        group = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        return {
            "state": {i: {name: banks[i] for name, banks in whole.items()} for i in indices},
            "param_groups": [{**group, "params": indices}],
        }

    def check_state(self, state: dict[Any, Any]) -> None:
        """`ValueError` unless `state` is that of `state_dict`, for these banks."""
        if state.keys() != set(range(len(self.banks))):
            raise ValueError(f"Muon: expected the state of {len(self.banks)} banks")
        for i, found in state.items():
            left_out = 3 - self.banks[i].ndim  # a matrix is stored as one, not as a bank
            expected = {
                name: part.data.new_empty(part.plan.shapes[i][left_out:]) for name, part in self._state().items()
            }
            check_tensors(f"Muon's bank {i}", found, expected)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of what `state_dict` gave."""
        state, (group,) = state_dict["state"], state_dict["param_groups"]
        self.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        self.reset()
        if state:  # {} before the first step, in checkpoints of a plain torch optimiser
            for name, part in self._state().items():
                part.take([state[i][name] for i in range(len(self.banks))])


def _check(params: Sequence[Tensor]) -> None:
    for index, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{index}]: expected a parameter, got {type(p).__name__}; one Muon has one group")
        if p.ndim not in (2, 3):
            raise ValueError(
                f"params[{index}]: shape {tuple(p.shape)} is not accepted; Muon takes matrices (rows, columns) and "
                "banks (count, rows, columns), and leaves the rest to AdamW or another optimiser"
            )
        if p.dtype != params[0].dtype:
            raise ValueError(f"params[{index}]: dtype {p.dtype}, but params[0] is {params[0].dtype}; use one dtype")


def _multipliers(params: Sequence[Tensor], given: Sequence[float | Tensor] | None) -> list[Tensor]:
    """(count, 1, 1) for each parameter."""
    banks = [as_bank(p) for p in params]
    if given is None:
        given = [1.0] * len(banks)
    if len(given) != len(banks):
        raise ValueError(f"lr_multipliers: {len(given)} for {len(banks)} parameters")
    result = []
    for index, (bank, multiplier) in enumerate(zip(banks, given, strict=True)):
        multiplier = torch.as_tensor(multiplier, dtype=bank.dtype, device=bank.device)
        if multiplier.shape not in ((), (len(bank),)):
            raise ValueError(
                f"lr_multipliers[{index}]: shape {tuple(multiplier.shape)}; expected a number or ({len(bank)},)"
            )
        result.append(multiplier.expand(len(bank)).reshape(-1, 1, 1).clone())
    return result


def _add_momentum(gradient: Tensor, buffer: Tensor, out: Tensor, momentum: float | Tensor, row_normalize: bool) -> None:
    buffer.mul_(momentum).add_(gradient)
    update = (buffer * momentum).add_(gradient)
    if row_normalize:
        update.div_(update.norm(dim=-1, keepdim=True).clamp_min_(1e-7))
    out.copy_(update)


def _move(bank: Tensor, update: Tensor, lr: float | Tensor, multiplier: Tensor, weight_decay: float) -> None:
    rate = multiplier * lr  # (count, 1, 1)
    scale = math.sqrt(max(1.0, bank.size(-2) / bank.size(-1)))
    bank.mul_(1.0 - rate * weight_decay).addcmul_(update.to(bank.dtype), rate * -scale)


def _renormalized(update: Tensor, dims: tuple[int, ...]) -> Tensor:
    x = update.to(torch.promote_types(update.dtype, torch.float32))
    norm = x.norm(dim=(-2, -1), keepdim=True)
    for dim in dims:
        x = x / x.norm(dim=dim, keepdim=True).clamp_min(1e-8)
    return _with_norm(x, norm)


def _variance_reduced(update: Tensor, variance: Tensor, beta2: float) -> Tensor:
    x = update.to(variance.dtype)
    variance.lerp_(x.square().mean(dim=-1, keepdim=True), 1.0 - beta2)
    return _with_norm(x / (variance.sqrt() + 1e-8), x.norm(dim=(-2, -1), keepdim=True))


def _with_norm(x: Tensor, norm: Tensor) -> Tensor:
    return x * (norm / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-8))
