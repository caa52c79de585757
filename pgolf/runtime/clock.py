"""The training clock: how long the steps so far took, and how many more there is time for."""

import time
from typing import Any

import torch

SYNCHRONISE_SECONDS = 1.0  # ranks synchronise time and signals this often at least, and more often near the end


class Stopwatch:
    """Seconds of training. Marks are set in passing and read later: on CUDA they are events, and reading one waits for
    that point of the device's work alone."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.cuda = device.type == "cuda"
        self.seconds_before = seconds
        self.begin: Any = None
        self.resume()

    def mark(self) -> Any:
        """Where the device's work stands when all that was launched so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        """Of training until `mark`, which must be younger than the last `resume`."""
        if not self.cuda:
            return self.seconds_before + mark - self.begin
        mark.synchronize()
        return self.seconds_before + self.begin.elapsed_time(mark) / 1000

    def passed(self, mark: Any) -> bool:
        """Whether `mark` can be read without waiting."""
        return not self.cuda or mark.query()

    def pause(self) -> float:
        """Wait for the device and stop; what is done until `resume` is not counted. Returns the seconds."""
        self.seconds_before = self.seconds(self.mark())
        return self.seconds_before

    def resume(self) -> None:
        self.begin = self.mark()


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
        """How many steps to take before the ranks synchronise again; 0 when not even one would end before `limit`.

        They may turn out twice as slow as the slowest of late.
        """
        left = limit - self.elapsed
        if self.slowest > left:
            return 0
        return max(1, int(min(SYNCHRONISE_SECONDS, left / 2) / self.slowest)) if self.slowest else 1
