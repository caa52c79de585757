"""The training loop: a hard wall-clock budget, Muon and AdamW, schedule, moving average, checkpoints."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pgolf.data.loader import TokenLoader
from pgolf.distributed import Ranks
from pgolf.errors import UserError
from pgolf.evaluate import Score
from pgolf.files import replacing
from pgolf.model import Model
from pgolf.optim import Ema, make_optimisers
from pgolf.run import CHECKPOINT, Interrupted, Run
from pgolf.settings import Settings

SYNC_STEPS = 10  # on a GPU the host waits for the device this often, so that its clock is the device's


class Trainer:
    """Trains `model` in place. The clock counts training steps, and later `spend`, against MAX_WALLCLOCK_SECONDS."""

    def __init__(self, model: Model, loader: TokenLoader, settings: Settings, ranks: Ranks, run: Run):
        self.model, self.loader, self.settings, self.ranks, self.run = model, loader, settings, ranks, run
        self.parameters = list(model.parameters())
        self.optimisers = make_optimisers(model, settings)
        self.ema = Ema(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.device = self.parameters[0].device
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and self.device.type == "cuda")
        self.loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if self.compiled else model.loss
        self.global_rows = settings.train_batch_tokens // settings.train_seq_len
        self.micro_rows = settings.micro_batch_tokens // settings.train_seq_len
        self.step = 0
        self.used_seconds = 0.0  # of the wall-clock budget
        self.step_seconds = 0.0  # of one step, cautiously
        if self.global_rows % ranks.world_size:
            raise UserError(
                f"TRAIN_BATCH_TOKENS={settings.train_batch_tokens} is {self.global_rows} rows of "
                f"TRAIN_SEQ_LEN={settings.train_seq_len}, which {ranks.world_size} processes cannot share evenly"
            )

    @property
    def train_limit_seconds(self) -> float:
        return self.settings.max_wallclock_seconds - self.settings.gptq_reserve_seconds

    def warm_up(self) -> None:
        """Untimed steps that compile and cache everything; afterwards weights, optimisers and data are as before."""
        weights = [p.detach().clone() for p in self.parameters]
        position = self.loader.state_dict()
        for _ in range(self.settings.warmup_steps):
            begin = time.perf_counter()
            self.take_step(0.0)
            self._synchronize()
            self.step_seconds = time.perf_counter() - begin
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        for optimiser in self.optimisers:
            optimiser.state.clear()
        self.loader.load_state_dict(position)
        (self.step_seconds,) = self.ranks.agree(self.step_seconds)

    def train(self, validate: Callable[[], Score]) -> None:
        """Steps until the iterations or the time for training are used up; the moving average becomes the weights.

        Every VAL_LOSS_EVERY steps `validate()` is called and logged, with the clock stopped.
        """
        settings, run = self.settings, self.run
        if self.step_seconds > self.train_limit_seconds:
            raise UserError(
                f"MAX_WALLCLOCK_SECONDS={settings.max_wallclock_seconds:g} is too small for one step: a step takes "
                f"{self.step_seconds:.2f} s and GPTQ_RESERVE_SECONDS={settings.gptq_reserve_seconds:g} are kept back"
            )
        zero = time.perf_counter() - self.used_seconds  # when the clock would have started, had it never stopped
        last = self.used_seconds
        with run.deferring_signals():
            while True:
                near_end = self.used_seconds + 2 * SYNC_STEPS * self.step_seconds > self.train_limit_seconds
                if self.step % SYNC_STEPS == 0 or near_end:
                    self._synchronize()
                elapsed = time.perf_counter() - zero
                # The longest of late: a step that is begun must end in time, on a busy machine too.
                self.step_seconds, last = max(elapsed - last, 0.9 * self.step_seconds), elapsed
                elapsed, stop = self.ranks.agree(elapsed, float(elapsed + self.step_seconds > self.train_limit_seconds))
                self.used_seconds = elapsed
                if self.ranks.any(run.signal is not None):
                    self.save()
                    raise Interrupted
                if stop or self.step >= settings.iterations:
                    break
                scale = lr_scale(settings, self.step, elapsed, self.train_limit_seconds)
                loss = self.take_step(scale)
                self.step += 1
                if self.ema:
                    self.ema.update()
                if settings.train_log_every and (self.step <= 10 or self.step % settings.train_log_every == 0):
                    self._log_step(loss, scale, time.perf_counter() - zero)
                if settings.val_loss_every and self.step % settings.val_loss_every == 0:
                    self._synchronize()
                    stopped = time.perf_counter()
                    run.log_score(self.step, validate(), stopped - zero)
                    zero += time.perf_counter() - stopped
            if stop:
                where = f"step:{self.step}/{settings.iterations}"
                run.log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms {where}")
            self.save()  # what follows can be repeated from here
        if self.ema and self.ema.updates:
            self.ema.copy_to_parameters()

    def calibration_batches(self) -> Iterator[torch.Tensor]:
        """Token rows (micro-batch, length) of the next GPTQ_CALIBRATION_BATCHES training batches, this rank's share."""
        for _ in range(self.settings.gptq_calibration_batches):
            yield from self.loader.next_batch()[0].split(self.micro_rows)

    def countdown(self) -> Callable[[], float]:
        """Start the clock again; the result tells how many seconds of the wall-clock budget are left."""
        end = time.perf_counter() + self.settings.max_wallclock_seconds - self.used_seconds

        def seconds_left() -> float:
            self._synchronize()
            return end - time.perf_counter()

        return seconds_left

    def take_step(self, scale: float) -> torch.Tensor:
        """Forward and backward over this rank's rows, sum over ranks, update. Returns the mean loss, on the device."""
        settings = self.settings
        inputs, targets = (x.to(self.device, non_blocking=True) for x in self.loader.next_batch())
        total = torch.zeros((), device=self.device)
        for x, y in zip(inputs.split(self.micro_rows), targets.split(self.micro_rows), strict=True):
            loss = self.loss(x, y) * (len(x) / self.global_rows)
            loss.backward()
            total += loss.detach()
        self.ranks.sum_(total, *(p.grad for p in self.parameters if p.grad is not None))
        if settings.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip_norm)
        muon, adam = self.optimisers
        fraction = (
            min(self.step / settings.muon_momentum_warmup_steps, 1.0) if settings.muon_momentum_warmup_steps else 1.0
        )
        start = settings.muon_momentum_warmup_start
        for group in muon.param_groups:
            group["momentum"] = start + fraction * (settings.muon_momentum - start)
        for optimiser in (muon, adam):
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return total

    def _log_step(self, loss: torch.Tensor, scale: float, seconds: float) -> None:
        value = float(loss)
        self.run.log(
            f"step:{self.step}/{self.settings.iterations} train_loss:{value:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / self.step:.2f}ms"
        )
        self.run.metric(
            "train",
            step=self.step,
            train_loss=value,
            lr_scale=scale,
            train_seconds=seconds,
            step_ms=1000 * seconds / self.step,
            tokens_seen=self.step * self.settings.train_batch_tokens,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self) -> None:
        """Write the checkpoint, from the first rank; all ranks hold the same state."""
        if not self.ranks.first:
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "ema": {"average": self.ema.average, "updates": self.ema.updates} if self.ema else None,
            "loader": self.loader.state_dict(),
            "step": self.step,
            "used_seconds": self.used_seconds,
        }
        with replacing(self.run.folder / CHECKPOINT) as file:
            torch.save(state, file)

    def load(self) -> None:
        """Go on from the run folder's checkpoint. Call after `warm_up`."""
        path = self.run.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            if self.ema:
                self.ema.average, self.ema.updates = state["ema"]["average"], state["ema"]["updates"]
            self.loader.load_state_dict(state["loader"])
            self.step, self.used_seconds = state["step"], state["used_seconds"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"{path}: not a checkpoint of these settings ({str(error).splitlines()[0]})") from None
        self.run.log(f"resumed: step:{self.step} train_time:{1000 * self.used_seconds:.0f}ms")


def lr_scale(settings: Settings, step: int, elapsed_seconds: float, limit_seconds: float) -> float:
    """1, then a straight line to MIN_LR_FRAC over the last WARMDOWN_FRAC of the budget (steps or time)."""
    done = max(step / settings.iterations, elapsed_seconds / limit_seconds)
    if done <= 1.0 - settings.warmdown_frac:
        return 1.0
    left = min(1.0, max(0.0, 1.0 - done) / settings.warmdown_frac)
    return settings.min_lr_frac + (1.0 - settings.min_lr_frac) * left
