"""The training loop: a hard wall-clock budget, Muon and AdamW, schedules, averages, checkpoints.

Its parts: the step budget (step_budget.py) decides when the ranks synchronise and when training is over, the log
(train_log.py) tells of single steps, checkpoints (checkpoint_writer.py) are written beside training, and validation is
the caller's. None of them waits for the device between two synchronisations.
"""

import signal
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from pgolf.data.batch import MicroBatch, slots
from pgolf.data.prefetch import Loader
from pgolf.data.tokenizer import ByteTable
from pgolf.errors import Interrupted, ScoreError, UserError
from pgolf.evaluation.scoring import Score
from pgolf.model import Model
from pgolf.model.attention import padding
from pgolf.model.flops import flops_per_token
from pgolf.quantization.config import QuantizationConfig
from pgolf.runtime.clock import Clock, Stopwatch
from pgolf.runtime.machine import allow_compilations, compilations
from pgolf.runtime.ranks import LostProcess, Ranks
from pgolf.runtime.utilisation import performance
from pgolf.settings import Settings
from pgolf.training import checkpoint, cuda_graphs
from pgolf.training.averaging import make_average
from pgolf.training.checkpoint import CHECKPOINT
from pgolf.training.checkpoint_writer import CheckpointWriter
from pgolf.training.losses import TrainingLoss
from pgolf.training.optim import OptimiserConfig, make_optimisers
from pgolf.training.qat import FakeQuantize
from pgolf.training.recorder import Aborted, Diverged, Recorder
from pgolf.training.schedule import Phase, Schedule
from pgolf.training.step_budget import StepBudget
from pgolf.training.train_log import DIVERGED_STEPS, TrainLog

GRAPHS = 64  # of the forward pass, at most: the compiler's own limit is 8, and each phase has one or two


class Trainer:
    """Trains `model` in place. The clock counts training steps, and then calibration, against MAX_WALLCLOCK_SECONDS."""

    def __init__(
        self,
        model: Model,
        loader: Loader,
        settings: Settings,
        ranks: Ranks,
        run: Recorder,
        byte_table: ByteTable | None = None,  # for BYTE_WEIGHTED_LOSS
    ):
        self.model, self.loader, self.settings, self.ranks, self.run = model, loader, settings, ranks, run
        self.schedule = Schedule.of(settings)
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and self.device.type == "cuda")
        # On CPU torch 2.13 cannot compile Muon's row normalisation, and there is nothing to win.
        self.optimisers = make_optimisers(
            model, OptimiserConfig.of(settings), ranks, compiled=self.compiled and self.device.type == "cuda"
        )
        self.average = make_average(
            self.parameters,
            ema_decay=settings.ema_decay,
            swa_every=settings.swa_every,
            swa_start_frac=settings.swa_start_frac,
        )
        self.quantized: FakeQuantize | None = None
        if settings.qat != "none":
            clip_sigmas = QuantizationConfig.of(settings).clip_sigmas
            self.quantized = FakeQuantize(settings.qat, settings.matrix_bits, clip_sigmas, self.device)
        if settings.byte_weighted_loss and byte_table is None:
            raise ValueError("BYTE_WEIGHTED_LOSS=1 needs byte_table, the tokenizer's")
        weights = byte_table if settings.byte_weighted_loss else None
        self.training_loss = TrainingLoss(model, settings.mtp_tokens, settings.mtp_loss_weight, weights)
        self.loss: Callable[..., torch.Tensor] = self.training_loss
        self.cuda_graphs = cuda_graphs.choose_cuda_graphs(settings.cuda_graphs, self.device, self.compiled)
        if self.compiled:
            allow_compilations(GRAPHS)
            options: dict[str, Any] = {"triton.cudagraphs": True} if self.cuda_graphs else {}
            self.loss = torch.compile(self.training_loss, fullgraph=True, dynamic=False, options=options)
        self.step = 0
        self.flops = 0  # of all steps, on all ranks together
        self.used_seconds = 0.0  # of the wall-clock budget
        self.saved_at_seconds = 0.0  # the newest checkpoint
        self.step_seconds = 0.0  # of one step, cautiously
        self.at_warmdown: Callable[[], None] | None = None  # called once, on all ranks, before the rate first falls
        self._enter(0.0)
        rows = settings.train_batch_tokens // settings.train_seq_len
        if rows % ranks.world_size:
            raise UserError(
                f"TRAIN_BATCH_TOKENS={settings.train_batch_tokens} is {rows} rows of "
                f"TRAIN_SEQ_LEN={settings.train_seq_len}, which {ranks.world_size} processes cannot share evenly"
            )

    @cached_property
    def writer(self) -> CheckpointWriter:
        """Made when first used: a benchmark's trainer belongs to no run."""
        return CheckpointWriter(self.run.folder, self.run.log, self.run.warn)

    @property
    def train_limit_seconds(self) -> float:
        return self.settings.max_wallclock_seconds - self.settings.gptq_reserve_seconds

    def _enter(self, used: float) -> None:
        """Whatever depends on the fraction of the budget that is used; nothing waits for the device."""
        self.training_loss.set_progress(used)
        phase = self.schedule.phase_at(used)
        if self.quantized and phase.quantized:
            self.quantized.set_progress(self.schedule.quantized_progress(used))
        self._set(phase)

    def _set(self, phase: Phase) -> None:
        self.phase = phase
        self.model.enter(looping=phase.looping, fake_quantize=self.quantized if phase.quantized else None)

    def warm_up(self) -> None:
        """Untimed steps that compile and cache everything; afterwards weights, optimisers and data are as before."""
        weights = [p.detach().clone() for p in self.parameters]
        position = self.loader.state_dict()
        steps, skipped = self.settings.warmup_steps, cuda_graphs.skipped()
        if self.cuda_graphs and steps:
            steps = max(steps, cuda_graphs.WARMUP_STEPS)
        self._warn_of_padding(max(phase.seq_len for phase in self.schedule.phases()))
        for phase in reversed(self.schedule.phases()):  # the first, with which training begins, is timed last
            self._set(phase)
            for _ in range(steps):
                begin = time.perf_counter()
                self.take_step(0.0)
                self._wait_for_device()
                self.step_seconds = time.perf_counter() - begin
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        self.optimisers.reset()
        self.loader.load_state_dict(position)
        (self.step_seconds,) = self.ranks.agree(self.step_seconds)
        self._enter(0.0)
        if self.cuda_graphs and (skipped := cuda_graphs.skipped() - skipped):
            self.run.log(f"cuda_graphs: {skipped} passes are not captured; TORCH_LOGS=perf_hints tells why")

    def _warn_of_padding(self, longest: int) -> None:
        """Of documents of at most `longest` tokens; a compiled step cannot warn by itself."""
        settings = self.settings
        by_rows = self.model.execution.attention in ("sdpa", "plain", "auto")
        if self.compiled and by_rows and settings.loader == "documents":
            length = min(settings.micro_batch_tokens, settings.train_batch_tokens // self.ranks.world_size)
            longest = min(longest, length)
            if line := padding(slots(length, longest) - 1, longest, length):
                self.run.warn(line)

    def train(self, validate: Callable[[], Score]) -> None:
        """Steps until the iterations or the time for training are used up; the moving average becomes the weights.

        Every VAL_LOSS_EVERY steps and after ABORT_STEP `validate()` is called and logged, with the clock stopped.
        """
        settings, run = self.settings, self.run
        if self.step_seconds > self.train_limit_seconds:
            raise UserError(
                f"MAX_WALLCLOCK_SECONDS={settings.max_wallclock_seconds:g} is too small for one step: a step takes "
                f"{self.step_seconds:.2f} s and GPTQ_RESERVE_SECONDS={settings.gptq_reserve_seconds:g} are kept back"
            )
        graphs = compilations()
        with run.deferring_signals():
            try:
                self._train(validate)
            except LostProcess as error:
                raise error.during(f"step {self.step}") from error
            finally:  # what an interrupted run has to tell, too
                tokens = self.step * settings.train_batch_tokens
                run.note(steps=self.step, tokens_seen=tokens, train_seconds=self.used_seconds)
        found = performance(self.flops, self.used_seconds, self.step, self.ranks.world_size, self.device)
        run.note(recompilations=compilations() - graphs, **found)
        run.log(" ".join(f"{name}:{round(value, 4)}" for name, value in found.items()))
        self.model.enter(looping=self.phase.looping)
        if not self.finite():
            raise self._diverged("its weights are not finite")
        if self.average:
            self.average.copy_to_parameters()

    def _train(self, validate: Callable[[], Score]) -> None:
        settings = self.settings
        watch, clock = Stopwatch(self.device, self.used_seconds), Clock(self.used_seconds, self.step_seconds)
        budget = StepBudget(self.ranks, watch, clock, settings.iterations, self.train_limit_seconds, self.step)
        log = TrainLog(
            self.run,
            watch,
            every=settings.train_log_every,
            iterations=settings.iterations,
            batch_tokens=settings.train_batch_tokens,
        )
        self.saved_at_seconds = self.used_seconds
        while self._goes_on(budget, log):
            used = budget.used(self.step)
            scale = self.schedule.lr_scale(used)
            self._before_warmdown(scale)
            begin = time.perf_counter()
            self._enter_and_tell(used)
            loss = self.take_step(scale)
            self._count_step()
            if self.average:
                self.average.update(self.step, scale)
            budget.count(log.add(self.step, loss, scale), time.perf_counter() - begin)
            if self._validation_due():
                log.write_all()
                with budget.clock_stopped() as seconds:
                    self._validate(validate, seconds)
        log.write_all()
        (self.used_seconds,) = self.ranks.agree(watch.pause())
        if not budget.steps:
            where = f"step:{self.step}/{settings.iterations}"
            self.run.log(f"stopping_early: wallclock_cap train_time:{1000 * self.used_seconds:.0f}ms {where}")
        self.save()  # what follows can be repeated from here

    def _goes_on(self, budget: StepBudget, log: TrainLog) -> bool:
        """Whether another step is taken; before that, synchronise and write a checkpoint where either is due."""
        signalled = self.run.signal is not None
        if not budget.due(self.step, signalled):
            return True
        diverged, signalled = budget.synchronise(self.step, log.diverged, signalled)
        self.used_seconds, self.step_seconds = budget.elapsed, budget.slowest
        if diverged:
            raise self._diverged(f"the loss has not been finite for {DIVERGED_STEPS} steps")
        if signalled:
            log.write_all()
            self.save()
            raise Interrupted(self.run.signal or signal.SIGTERM)
        if budget.spent(self.step):
            return False
        if self._checkpoint_due(budget):
            self.saved_at_seconds = budget.elapsed
            log.write_all()
            with budget.clock_stopped() as seconds:
                self.used_seconds = seconds
                self.save(beside=True)
        return True

    def _before_warmdown(self, scale: float) -> None:
        if scale < 1.0 and self.at_warmdown:
            self.at_warmdown()
            self.at_warmdown = None

    def _enter_and_tell(self, used: float) -> None:
        before = self.phase
        self._enter(used)
        if self.phase != before:
            self.run.log(f"phase: step:{self.step} {self.phase.line}")

    def _count_step(self) -> None:
        self.step += 1
        tokens, phase = self.settings.train_batch_tokens, self.phase
        self.flops += tokens * flops_per_token(self.model.config, phase.looping, phase.seq_len)

    def _checkpoint_due(self, budget: StepBudget) -> bool:
        """Every CHECKPOINT_MINUTES of training, but not when little more than the one at the end would be lost."""
        between = 60 * self.settings.checkpoint_minutes
        if not between or budget.elapsed - self.saved_at_seconds < between:
            return False
        return budget.limit - budget.elapsed > between / 2

    def _validation_due(self) -> bool:
        every = self.settings.val_loss_every
        return self.step == self.settings.abort_step or bool(every and self.step % every == 0)

    def _validate(self, validate: Callable[[], Score], seconds: float) -> None:
        """Score the weights as they are, not rounded. `Aborted` after ABORT_STEP if they are worse than ABORT_BPB."""
        settings = self.settings
        self.model.enter(looping=self.phase.looping)
        try:
            score = validate()
        except ScoreError as error:
            raise self._diverged(str(error)) from None
        self._set(self.phase)
        self.run.log_score(self.step, settings.iterations, score, seconds)
        if self.step == settings.abort_step and settings.abort_bpb and not score.bpb <= settings.abort_bpb:
            self.used_seconds = seconds
            self.run.note(val_loss_float=score.loss, val_bpb_float=score.bpb)
            raise Aborted(f"step {self.step}: val_bpb {score.bpb:.4f} is above ABORT_BPB={settings.abort_bpb:g}")

    def calibration_batches(self) -> Iterator[MicroBatch]:
        """Of the next GPTQ_CALIBRATION_BATCHES training batches, this rank's share, on the device."""
        for _ in range(self.settings.gptq_calibration_batches):
            yield from self.micro_batches()

    def micro_batches(self) -> Iterator[MicroBatch]:
        batch = self.loader.next_batch().to(self.device)
        return batch.micro_batches(self.settings.micro_batch_tokens, self.phase.seq_len)

    def countdown(self) -> Callable[[], float]:
        """Start the clock again; the result tells how many seconds of the wall-clock budget are left."""
        end = time.perf_counter() + self.settings.max_wallclock_seconds - self.used_seconds

        def seconds_left() -> float:
            self._wait_for_device()
            return end - time.perf_counter()

        return seconds_left

    def take_step(self, scale: float) -> torch.Tensor:
        """Forward and backward over this rank's rows, sum over ranks, update. Returns the mean loss, on the device."""
        settings = self.settings
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(self.micro_batches()):
            if self.cuda_graphs:
                if number == 1:
                    cuda_graphs.keep_gradients(self.parameters)
                cuda_graphs.begin()
            loss = self.loss(*batch) * (batch.targets.numel() / settings.train_batch_tokens)
            loss.backward()
            total += loss.detach()
        self.optimisers.set_rates(scale, momentum=self.schedule.muon_momentum(self.step))
        if self.average:
            self.average.join()
        return self.optimisers.step(total)

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _diverged(self, what: str) -> Diverged:
        self.writer.settle()
        kept = [path.name for path in checkpoint.candidates(self.run.folder)]
        return Diverged(f"step {self.step}: {what}; kept: {', '.join(kept) or 'no checkpoint, for none was due'}")

    def finite(self) -> bool:
        """Whether weights and averages are, on all ranks; waits for the device."""
        values = [*self.parameters, *(self.average.average if self.average else [])]
        finite = torch.stack([torch.isfinite(value).all() for value in values]).all()
        return not self.ranks.any(not bool(finite))

    def save(self, beside: bool = False) -> None:
        """Write the checkpoint, from the first rank; with `beside`, while training goes on. All ranks must call it:
        each has a part of the momentum."""
        begin = time.perf_counter()
        optimisers = self.optimisers.state_dict()
        if not self.ranks.first:
            return
        state = {
            "model": self.model.state_dict(),
            "optimisers": optimisers,
            "average": self.average.state_dict() if self.average else None,
            "loader": self.loader.state_dict(),
            "step": self.step,
            "flops": self.flops,
            "used_seconds": self.used_seconds,
        }
        if beside:
            self.writer.begin(state, since=begin)
        else:
            self.writer.write(state)
        self.run.note(checkpoints=self.writer.count, checkpoint_seconds=round(self.writer.stopped_seconds, 3))

    def load(self) -> None:
        """Go on from the run folder's checkpoint. Call after `warm_up`."""
        path = checkpoint.load_first(
            self.run.folder, self._restore, self.run.warn, agreed=lambda fine: not self.ranks.any(not fine)
        )
        self.writer.keep_old = path.name == CHECKPOINT
        self.run.log(f"resumed: step:{self.step} train_time:{1000 * self.used_seconds:.0f}ms")

    def _restore(self, state: checkpoint.State) -> None:
        """Take over a state; `ValueError` where it is not one of this model, these optimisers and this data."""
        checkpoint.check_tensors("model", state["model"], self.model.state_dict())
        if (state["average"] is None) != (self.average is None):
            raise ValueError("average: these settings have one, or that run had")
        self.model.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.flops, self.used_seconds = state["step"], state["flops"], state["used_seconds"]
