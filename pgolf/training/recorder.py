"""To whom training tells what happens, and the ways in which it ends early."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from pgolf.errors import PgolfError
from pgolf.evaluation.scoring import Score


class Ended(PgolfError):
    """A rule ended the run. It ends with `status`, its summary written, in which the field `name` is true."""

    name, status = "", 0


class Aborted(Ended):
    """The early validation was worse than ABORT_BPB."""

    name, status = "aborted", 3


class Diverged(Ended):
    """Loss or weights are not finite any more."""

    name, status = "diverged", 5


class Recorder(Protocol):
    """What a Trainer needs of a run; `pgolf.run.record.Run` is one."""

    folder: Path  # of the checkpoints
    signal: int | None  # SIGINT or SIGTERM, once it came

    def log(self, line: str, console: bool = True) -> None: ...

    def warn(self, line: str) -> None: ...

    def metric(self, kind: str, **values: Any) -> None: ...

    def log_score(self, step: int, iterations: int, score: Score, train_seconds: float) -> None: ...

    def note(self, **values: Any) -> None:
        """Set fields of the summary."""

    def deferring_signals(self) -> AbstractContextManager[None]:
        """Inside, a signal only sets `signal`; at the end it takes effect."""
        ...
