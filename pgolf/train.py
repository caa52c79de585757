"""The training loop: a hard wall-clock budget, Muon and AdamW, schedule, moving average, checkpoints."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pgolf.data.loader import TokenLoader
from pgolf.distributed import LostProcess, Ranks
from pgolf.errors import UserError
from pgolf.evaluate import Score
from pgolf.files import replacing
from pgolf.model import Model
from pgolf.optim import Ema, make_optimisers
from pgolf.run import CHECKPOINT, Interrupted, Run
from pgolf.settings import Settings

TALK_SECONDS = 1.0  # the ranks talk about time and signals this often at least, and more often near the end


class Trainer:
    """Trains `model` in place. The clock counts training steps, and later `spend`, against MAX_WALLCLOCK_SECONDS."""

    def __init__(self, model: Model, loader: TokenLoader, settings: Settings, ranks: Ranks, run: Run):
        self.model, self.loader, self.settings, self.ranks, self.run = model, loader, settings, ranks, run
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and self.device.type == "cuda")
        # On CPU torch 2.13 cannot compile Muon's row normalisation, and there is nothing to win.
        self.optimisers = make_optimisers(model, settings, ranks, self.compiled and self.device.type == "cuda")
        self.ema = Ema(self.parameters, settings.ema_decay) if settings.ema_decay else None
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
        self.optimisers.reset()
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
        with run.deferring_signals():
            try:
                self._train(validate)
            except LostProcess as error:
                raise error.during(f"step {self.step}") from error
        if self.ema and self.ema.updates:
            self.ema.copy_to_parameters()

    def _train(self, validate: Callable[[], Score]) -> None:
        settings, run, limit = self.settings, self.run, self.train_limit_seconds
        zero = time.perf_counter() - self.used_seconds  # when the clock would have started, had it never stopped
        clock = Clock(self.used_seconds, self.step_seconds)
        talk_at = self.step
        while True:
            if self.step == talk_at or (run.signal is not None and self.ranks.world_size == 1):
                self._synchronize()
                clock.read(time.perf_counter() - zero)
                (elapsed, mean, slowest, steps), signalled = self.ranks.share(
                    clock.elapsed, clock.mean, clock.slowest, clock.steps_ahead(limit), flag=run.signal is not None
                )
                self.used_seconds, self.step_seconds, talked = elapsed, slowest, self.step
                if signalled:
                    self.save()
                    raise Interrupted
                if not steps or self.step >= settings.iterations:
                    break
                talk_at = min(self.step + int(steps), settings.iterations)
            begin = time.perf_counter()
            # Between two talks all ranks go by the same guess of the time.
            scale = lr_scale(settings, self.step, elapsed + (self.step - talked) * mean, limit)
            loss = self.take_step(scale)
            self.step += 1
            if self.ema:
                self.ema.update()
            clock.tick(time.perf_counter() - begin)
            if settings.train_log_every and (self.step <= 10 or self.step % settings.train_log_every == 0):
                self._log_step(loss, scale, time.perf_counter() - zero)
            if settings.val_loss_every and self.step % settings.val_loss_every == 0:
                self._synchronize()
                stopped = time.perf_counter()
                run.log_score(self.step, validate(), stopped - zero)
                zero += time.perf_counter() - stopped
        if not steps:
            where = f"step:{self.step}/{settings.iterations}"
            run.log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms {where}")
        self.save()  # what follows can be repeated from here

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
        inputs, targets = (x.to(self.device, non_blocking=True) for x in self.loader.next_batch()[:2])
        total = torch.zeros((), device=self.device)
        for x, y in zip(inputs.split(self.micro_rows), targets.split(self.micro_rows), strict=True):
            loss = self.loss(x, y) * (len(x) / self.global_rows)
            loss.backward()
            total += loss.detach()
        warm_up = settings.muon_momentum_warmup_steps
        fraction = min(self.step / warm_up, 1.0) if warm_up else 1.0
        start = settings.muon_momentum_warmup_start
        self.optimisers.set_rates(scale, momentum=start + fraction * (settings.muon_momentum - start))
        return self.optimisers.step(total)

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
        """Write the checkpoint, from the first rank. All ranks must call it: each has a part of the momentum."""
        optimisers = self.optimisers.state_dict()
        if not self.ranks.first:
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimisers": optimisers,
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
            self.optimisers.load_state_dict(state["optimisers"])
            if self.ema:
                self.ema.average, self.ema.updates = state["ema"]["average"], state["ema"]["updates"]
            self.loader.load_state_dict(state["loader"])
            self.step, self.used_seconds = state["step"], state["used_seconds"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"{path}: not a checkpoint of these settings ({str(error).splitlines()[0]})") from None
        self.run.log(f"resumed: step:{self.step} train_time:{1000 * self.used_seconds:.0f}ms")


class Clock:
    """The training clock as the first rank reads it, and how far ahead it may promise steps."""

    def __init__(self, elapsed: float, step_seconds: float):
        self.elapsed, self.mean, self.slowest = elapsed, step_seconds, step_seconds  # seconds; the latter two of a step
        self.steps, self.longest = 0, 0.0  # since the last reading

    def tick(self, seconds: float) -> None:
        """One more step; `seconds` as the host saw it, which a GPU may exceed."""
        self.steps, self.longest = self.steps + 1, max(self.longest, seconds)

    def read(self, elapsed: float) -> None:
        if self.steps:
            self.mean = (elapsed - self.elapsed) / self.steps
            # The slowest of late: a step that is begun must end in time, on a busy machine too.
            self.slowest = max(self.mean, self.longest, 0.9**self.steps * self.slowest)
        self.elapsed, self.steps, self.longest = elapsed, 0, 0.0

    def steps_ahead(self, limit: float) -> int:
        """How many steps to take before the ranks talk again; 0 when not even one would end before `limit`.

        They may turn out twice as slow as the slowest of late.
        """
        left = limit - self.elapsed
        if self.slowest > left:
            return 0
        return max(1, int(min(TALK_SECONDS, left / 2) / self.slowest)) if self.slowest else 1


def lr_scale(settings: Settings, step: int, elapsed_seconds: float, limit_seconds: float) -> float:
    """1, then over the last WARMDOWN_FRAC of the budget (steps or time) a straight line to 0, MIN_LR at least."""
    done = max(step / settings.iterations, elapsed_seconds / limit_seconds)
    if done <= 1.0 - settings.warmdown_frac:
        return 1.0
    return max((1.0 - done) / settings.warmdown_frac, settings.min_lr)
