"""Lines and metrics about single steps, and whether the loss diverged. Each is told once the device is done with the
step, so that nothing waits for it."""

import math
from collections import deque
from typing import Any

from torch import Tensor

from pgolf.runtime.clock import Stopwatch
from pgolf.training.recorder import Recorder

FIRST_STEPS = 10  # each is logged
DIVERGED_STEPS = 10  # so many losses in a row that are not finite: the weights are lost


class TrainLog:
    """Of the first steps and every `every`-th; 0: of none. The loss of every step is looked at."""

    def __init__(self, run: Recorder, watch: Stopwatch, *, every: int, iterations: int, batch_tokens: int):
        self.run, self.watch = run, watch
        self.every, self.iterations, self.batch_tokens = every, iterations, batch_tokens
        self.waiting: deque[tuple[int, Tensor, float, Any]] = deque()
        self.lost = 0  # steps on end whose loss was not finite, up to the last one that is known

    @property
    def diverged(self) -> bool:
        return self.lost >= DIVERGED_STEPS

    def add(self, step: int, loss: Tensor, scale: float) -> Any:
        """The step just launched; `loss` is a scalar on the device. Writes what has been done by now. Returns the mark
        of this step."""
        value = loss.to("cpu", non_blocking=True)  # there when the mark has passed
        mark = self.watch.mark()
        self.waiting.append((step, value, scale, mark))
        while self.waiting and self.watch.passed(self.waiting[0][-1]):
            self.write(*self.waiting.popleft())
        return mark

    def write_all(self) -> None:
        """Wait for what is not done."""
        if self.waiting:
            self.watch.seconds(self.waiting[-1][-1])
        while self.waiting:
            self.write(*self.waiting.popleft())

    def write(self, step: int, loss: Tensor, scale: float, mark: Any) -> None:
        """Of a step that is done; its `loss` lies in the host's memory."""
        value = float(loss)
        self.lost = 0 if math.isfinite(value) else self.lost + 1
        if not self.every or not (step <= FIRST_STEPS or step % self.every == 0):
            return
        seconds = self.watch.seconds(mark)
        self.run.log(
            f"step:{step}/{self.iterations} train_loss:{value:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms"
        )
        self.run.metric(
            "train",
            step=step,
            train_loss=value,
            lr_scale=scale,
            train_seconds=seconds,
            step_ms=1000 * seconds / step,
            tokens_seen=step * self.batch_tokens,
        )
