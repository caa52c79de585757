"""What a run tells on its way: the log, standard error, metrics. A disk or a reader that fails ends none of it."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgolf.evaluation.scoring import Score
from pgolf.run.folder import RunFolder
from pgolf.runtime.files import Lines, WriteError, finite


class RunLog:
    """Of the first rank, which has a folder of its `own` in which the files grow; the others' say nothing.

    A file that cannot be written is warned about once and remembered in `unwritten`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.own: RunFolder | None = None
        self.metrics: Lines | None = None
        self.unwritten: dict[Path, str] = {}  # with the reason

    def log(self, line: str, console: bool = True) -> None:
        if self.own is None:
            return
        if console:
            try:
                print(line, flush=True)
            except OSError as error:  # a full disk behind it, or a reader that is gone
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                self.not_written(Path("standard output"), error.strerror or "input/output error")
        with self.kept():
            self.own.log.add(line)

    def warn(self, line: str) -> None:
        """One line for standard error and the log; the run goes on."""
        if self.own:
            self.tell(f"warning: {line}")

    def tell(self, line: str) -> None:
        """One line for standard error and the log."""
        with contextlib.suppress(OSError):
            print(f"train_gpt.py: {line}", file=sys.stderr, flush=True)
        self.log(line, console=False)

    def metric(self, kind: str, **values: float) -> None:
        if self.own:
            with self.kept():
                self.metrics = self.metrics or Lines(self.folder / "metrics.jsonl")
                self.metrics.add(json.dumps(finite({"kind": kind, **values})))

    @contextmanager
    def kept(self):
        """A file that cannot be written inside is remembered for the end of the run."""
        try:
            yield
        except WriteError as error:
            self.not_written(error.path, error.reason)

    def not_written(self, path: Path, reason: str) -> None:
        if path not in self.unwritten:
            self.unwritten[path] = reason
            self.warn(f"{path}: cannot be written ({reason}); the run goes on")

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of what is only a figure, or None and a line: nothing that it raises ends the run."""
        try:
            return function(*arguments)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            self.warn(f"{what} could not be made ({type(error).__name__}: {reason}); the run goes on")
            return None

    def log_score(self, step: int, iterations: int, score: Score, train_seconds: float) -> None:
        """A validation in the community's words, and as a metric."""
        self.log(
            f"step:{step}/{iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
            f"train_time:{1000 * train_seconds:.0f}ms step_avg:{1000 * train_seconds / max(step, 1):.2f}ms"
        )
        self.metric("val", step=step, val_loss=score.loss, val_bpb=score.bpb, train_seconds=train_seconds)
