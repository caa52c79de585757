"""Lines and metrics about single steps, written when the device has got there, so that nobody waits for it."""

from collections import deque
from typing import Any

from torch import Tensor

from pgolf.clock import Stopwatch
from pgolf.run import Run
from pgolf.settings import Settings

FIRST_STEPS = 10  # each is logged


class TrainLog:
    """Of the first steps and every TRAIN_LOG_EVERY-th."""

    def __init__(self, run: Run, settings: Settings, watch: Stopwatch):
        self.run, self.settings, self.watch = run, settings, watch
        self.waiting: deque[tuple[int, Tensor, float, Any]] = deque()

    def add(self, step: int, loss: Tensor, scale: float) -> None:
        """The step just launched; `loss` is a scalar on the device. Writes what has been done by now."""
        every = self.settings.train_log_every
        if every and (step <= FIRST_STEPS or step % every == 0):
            value = loss.to("cpu", non_blocking=True)  # there when the mark has passed
            self.waiting.append((step, value, scale, self.watch.mark()))
        while self.waiting and self.watch.passed(self.waiting[0][-1]):
            self._write(*self.waiting.popleft())

    def write_all(self) -> None:
        """Wait for what is not done."""
        while self.waiting:
            self._write(*self.waiting.popleft())

    def _write(self, step: int, loss: Tensor, scale: float, mark: Any) -> None:
        seconds = self.watch.seconds(mark)
        value = float(loss)
        self.run.log(
            f"step:{step}/{self.settings.iterations} train_loss:{value:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms"
        )
        self.run.metric(
            "train",
            step=step,
            train_loss=value,
            lr_scale=scale,
            train_seconds=seconds,
            step_ms=1000 * seconds / step,
            tokens_seen=step * self.settings.train_batch_tokens,
        )
