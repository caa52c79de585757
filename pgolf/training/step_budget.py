"""How many steps are taken until the ranks next synchronise, and how much of the budget is used meanwhile.

The first rank decides, by its clock. Between two synchronisations every rank takes the same steps and estimates the
time alike, and nothing waits for the device; at one, the host waits only for work that lies `LAG` steps back.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

from pgolf.runtime.clock import Clock, Stopwatch
from pgolf.runtime.ranks import Ranks
from pgolf.training.schedule import used_fraction

LAG = 2  # steps that a GPU may still have before it when the clock is read


class StepBudget:
    """Of a run that takes `iterations` steps at most and no step that would end after `limit` seconds of training."""

    def __init__(self, ranks: Ranks, watch: Stopwatch, clock: Clock, iterations: int, limit: float, step: int):
        self.ranks, self.watch, self.clock, self.iterations, self.limit = ranks, watch, clock, iterations, limit
        self.marks: deque[Any] = deque(maxlen=LAG + 1 if watch.cuda else 1)  # after each of the latest steps
        self.synchronised_at, self.synchronise_at = step, step  # the last time, and the next
        # What the ranks agreed on when they last synchronised:
        self.elapsed = clock.elapsed  # seconds of training
        self.mean, self.slowest = clock.mean, clock.slowest  # seconds of a step
        self.steps = 0  # until they synchronise again; 0: not even one would end in time

    def due(self, step: int, signalled: bool) -> bool:
        """Whether the ranks synchronise before `step`; a process that is alone does so at once when `signalled`."""
        return step == self.synchronise_at or (signalled and self.ranks.world_size == 1)

    def synchronise(self, step: int, diverged: bool, signalled: bool) -> tuple[bool, bool]:
        """Agree on the time and on the next steps. Returns whether training diverged on the first rank, and whether any
        rank was signalled."""
        if self.marks:  # the steps after the mark are estimated
            self.clock.read(self.watch.seconds(self.marks[0]) + (len(self.marks) - 1) * self.clock.mean)
        clock = self.clock
        (self.elapsed, self.mean, self.slowest, steps, lost), stop = self.ranks.share(
            clock.elapsed,
            clock.mean,
            clock.slowest,
            clock.steps_ahead(self.limit),
            float(diverged),
            flag=signalled,
        )
        self.steps, self.synchronised_at = int(steps), step
        self.synchronise_at = min(step + self.steps, self.iterations)
        return bool(lost), stop

    def spent(self, step: int) -> bool:
        """Whether `step` steps are all."""
        return self.steps == 0 or step >= self.iterations

    def used(self, step: int) -> float:
        """The fraction of the budget that is used when `step` steps are done, 0 to 1, the same on every rank."""
        seconds = self.elapsed + (step - self.synchronised_at) * self.mean
        return used_fraction(self.iterations, step, seconds, self.limit)

    def count(self, mark: Any, seconds: float) -> None:
        """One more step, which is done when `mark` has passed; the host was busy with it for `seconds`."""
        self.marks.append(mark)
        self.clock.tick(seconds)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[float]:
        """Wait for the device; what is done inside counts as no training. Gives the seconds of training until here."""
        self.clock.read(self.watch.pause())
        yield self.clock.elapsed
        self.marks.clear()
        self.watch.resume()
