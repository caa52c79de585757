"""The record of one run: its folder, log, metrics and summary, and what happens when it is interrupted.

Only the first rank writes. Every file is valid at any moment: whole files are replaced by renaming, logs are appended
line by line.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from pgolf import ops
from pgolf.errors import Interrupted, PgolfError, QuantizeError, ScoreError, UserError, out_of_memory
from pgolf.run.folder import ARTIFACT, claim, default_name, read_summary
from pgolf.run.log import RunLog
from pgolf.run.report import write_report
from pgolf.run.saved_settings import read_settings, write_settings
from pgolf.runtime.files import WriteError, finite, write_json
from pgolf.runtime.machine import cpu_levels, cpu_name
from pgolf.runtime.ranks import LostProcess, Ranks
from pgolf.runtime.versions import git_commit, versions
from pgolf.settings import PRESETS, Settings, given_settings, load_settings
from pgolf.training import checkpoint
from pgolf.training.checkpoint import CHECKPOINT
from pgolf.training.recorder import Diverged, Ended

# In the order of the documentation; unknown until measured, so that an interrupted run's summary has every field.
SUMMARY_FIELDS = (  # noqa: SIM905
    "run_id preset seed started_at command commit device device_name threads cpu_level world_size parameters steps "
    "tokens_seen train_seconds step_ms tflop_per_s peak_memory_bytes checkpoints checkpoint_seconds "
    "val_loss_float val_bpb_float val_loss_quantized val_bpb_quantized val_bpb_ngram val_tokens val_bytes "
    "artifact_bytes projected_artifact_bytes code_bytes code_bytes_raw "
    "total_bytes budget_bytes fits_budget bytes_by_role seconds "
    "max_wallclock_seconds wallclock_used_seconds within_wallclock max_eval_seconds within_eval "
    "compressors_bpb backends fallbacks attention compile cuda_graphs recompilations dtype "
    "interrupted aborted diverged versions"
).split()
OPTIONAL_FIELDS = ("mfu",)  # of devices whose peak is known
# What was measured once: to go on with a run that has its result already measures it no better.
MEASURED = (  # noqa: SIM905
    "started_at command train_seconds step_ms tflop_per_s mfu peak_memory_bytes checkpoints checkpoint_seconds "
    "recompilations seconds wallclock_used_seconds within_wallclock within_eval"
).split()


OVER_BUDGET = 4  # status of a run that is whole, but larger or slower than it was allowed to be


class Run(RunLog):
    """Use as a context: it takes the folder, catches the two signals, and leaves a valid summary and report behind.

    A file that cannot be written does not end the run, but for the artifact: it is warned about, and the run ends with
    status 2 when all the rest is written.
    """

    def __init__(self, settings: Settings, ranks: Ranks):
        super().__init__(settings.run_folder)
        self.settings, self.ranks = settings, ranks
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.before: dict[str, Any] = {}  # the summary of the sitting that is gone on with
        self.summary: dict[str, Any] = dict.fromkeys(SUMMARY_FIELDS)
        self.signal: int | None = None
        self.deferring = False
        cuda = ranks.device.type == "cuda"
        self.note(
            preset=settings.preset,
            seed=settings.seed,
            started_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
            device=ranks.device.type,
            device_name=torch.cuda.get_device_name() if cuda else cpu_name(),
            threads=torch.get_num_threads(),
            world_size=ranks.world_size,
            budget_bytes=settings.budget_bytes,
            max_wallclock_seconds=settings.max_wallclock_seconds,
            max_eval_seconds=settings.max_eval_seconds,
            checkpoints=0,
            checkpoint_seconds=0.0,
            interrupted=False,
            aborted=False,
            diverged=False,
        )

    def __enter__(self) -> "Run":
        name = b""
        if self.ranks.first:
            try:
                self._take_folder()
                name = os.fsencode(self.folder)
            except UserError as error:
                name = b"\0" + os.fsencode(str(error))  # no path begins like this
        name = self.ranks.agree_bytes(name)  # it may have the time in it
        if name.startswith(b"\0"):
            raise UserError(os.fsdecode(name[1:]))
        self.folder = Path(os.fsdecode(name))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        sys.unraisablehook = self._on_unraisable
        if self.own and self.own.notice:
            self.log(self.own.notice)
        for setting, value in sorted(self.settings.model_dump().items()):
            self.log(f"setting {setting}:{value}", console=False)
        return self

    def _take_folder(self) -> None:
        settings = self.settings
        self.own = claim(
            settings.out_dir, settings.run_id, default_name(settings.preset, settings.seed), bool(settings.resume)
        )
        self.folder = self.own.path
        self.settings = settings.model_copy(update={"run_id": self.folder.name})
        self.note(run_id=self.folder.name, versions=versions(), cpu_level=cpu_levels(), commit=git_commit())
        if settings.resume:
            self.before = read_summary(self.folder)
            seconds = self.before.get("seconds")
            if isinstance(seconds, dict) and not self._had_result:
                self.seconds = {name: value for name, value in seconds.items() if isinstance(value, float)}
        try:
            write_settings(self.folder / "settings.json", self.settings)
        except UserError:
            self.own.forget()
            raise

    @property
    def _had_result(self) -> bool:
        """Whether the run that is gone on with was through."""
        return self.before.get("val_bpb_quantized") is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.deferring = True  # a further signal must not tear what is written now
        try:
            self._end(error)
        finally:
            sys.unraisablehook = sys.__unraisablehook__
            if self.own:
                self.own.log.close()
                self.own = None

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, Interrupted):
            self.note(interrupted=True)
            self.close()
            self.log(f"interrupted{self._how_to_go_on()}")
            sys.exit(error.status)
        alone = isinstance(error, QuantizeError)  # what the first rank does while the others wait
        if isinstance(error, ScoreError | QuantizeError):
            error = Diverged(f"{error}; {self._safe()}")
        if isinstance(error, Ended):
            self.note(**{error.name: True})
            self.close()
            self.log(f"{error.name}: {error}")
            if not alone:
                self._leave_together(error.status)
            sys.exit(error.status)
        if self.own and error and (isinstance(error, PgolfError) or out_of_memory(error)):
            self._end_refused(error)
        if error is None:
            self._end_whole()

    def _end_refused(self, error: BaseException) -> None:
        """Leave no folder behind for a run that was refused before it did anything, and else all there is to keep."""
        assert self.own
        if {path.name for path in self.folder.iterdir()} <= {"settings.json", "train.log"} and not self.before:
            self.own.forget()
            return
        self.note(interrupted=True)
        self.close()
        words = str(error) if isinstance(error, WriteError) else out_of_memory(error)
        if words:
            raise UserError(f"{words}; {self._safe()}") from error
        if isinstance(error, LostProcess):
            self.log(f"stopped{self._how_to_go_on()}")

    def _end_whole(self) -> None:
        """Status 2 when a file is missing, 4 when a budget was missed."""
        missed = self._missed_budgets()
        if missed and self.own:
            self.tell(f"over budget: {'; '.join(missed)}")
        (over,) = self.ranks.agree(len(missed))
        if self.unwritten:
            files = ", ".join(f"{path.name} ({reason})" for path, reason in self.unwritten.items())
            raise UserError(f"not all could be written: {files}; {self._safe()}")
        if over:
            self._leave_together(OVER_BUDGET)

    def _missed_budgets(self) -> list[str]:
        summary, settings = self.summary, self.settings
        missed = []
        if summary["fits_budget"] is False:
            missed.append(
                f"{summary['total_bytes']:,} bytes of artifact and code, BUDGET_BYTES={settings.budget_bytes}"
            )
        if settings.artifact_bytes and (summary["artifact_bytes"] or 0) > settings.artifact_bytes:
            missed.append(f"{summary['artifact_bytes']:,} bytes of artifact, ARTIFACT_BYTES={settings.artifact_bytes}")
        if summary["within_wallclock"] is False:
            used = summary["wallclock_used_seconds"]
            missed.append(f"{used:.1f} s of training, MAX_WALLCLOCK_SECONDS={settings.max_wallclock_seconds:g}")
        if summary["within_eval"] is False:
            missed.append(f"the evaluation took longer than MAX_EVAL_SECONDS={settings.max_eval_seconds:g}")
        return missed

    def _leave_together(self, status: int) -> None:
        """All ranks with one status, when the first has written everything: the launcher ends all after one."""
        with contextlib.suppress(LostProcess):
            self.ranks.wait()
        if self.ranks.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, to those that are a moment behind
        sys.exit(status)

    def _how_to_go_on(self) -> str:
        if checkpoint.candidates(self.folder):
            return f"; go on with RESUME={self.folder}"
        return " before its first checkpoint; nothing to resume"

    def _safe(self) -> str:
        names = (ARTIFACT, CHECKPOINT, checkpoint.PREVIOUS, "summary.json", "report.html", "metrics.jsonl", "train.log")
        there = [name for name in names if (self.folder / name).exists() and self.folder / name not in self.unwritten]
        return f"safe in {self.folder}: {', '.join(there) or 'nothing'}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # torchrun repeats what the terminal sent
            return
        self.signal = number
        if not self.deferring:
            raise Interrupted(number)

    def _on_unraisable(self, dropped: Any) -> None:
        """Python drops what is raised in the callback of a weak reference: the signal comes once more, a moment later,
        when that is over."""
        if not isinstance(dropped.exc_value, Interrupted) or self.signal is None:
            sys.__unraisablehook__(dropped)
            return
        number, self.signal = self.signal, None
        # To the main thread, which it wakes: what another thread raises for itself leaves that one asleep.
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    @contextmanager
    def deferring_signals(self):
        """Inside, a signal only sets `signal`, for a loop that stops between two steps; at the end it takes effect."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.signal is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def timed(self, name: str):
        """Add the block's wall-clock seconds to `seconds[name]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def warn_of_budget(self, code_bytes: int) -> None:
        """Before the work, of a budget that is going to be missed."""
        settings = self.settings
        if settings.artifact_bytes + code_bytes > settings.budget_bytes:
            asked = f"ARTIFACT_BYTES={settings.artifact_bytes} and " if settings.artifact_bytes else ""
            self.warn(f"{asked}{code_bytes} bytes of code are over BUDGET_BYTES={settings.budget_bytes}")

    def note(self, **values: Any) -> None:
        """Set fields of the summary."""
        unknown = values.keys() - {*SUMMARY_FIELDS, *OPTIONAL_FIELDS}
        assert not unknown, unknown
        self.summary.update(values)

    def close(self) -> None:
        """Write summary and report."""
        self.seconds["total"] = self.seconds.pop("total", 0.0) + time.perf_counter() - self.started
        self.started = time.perf_counter()
        if not self.own:
            return
        self.note(backends=ops.used(), fallbacks=ops.fallbacks())
        self.note(seconds={name: round(value, 3) for name, value in self.seconds.items()})
        if self._had_result:
            self.summary.update({name: self.before[name] for name in MEASURED if name in self.before})
        elif self.before.get("started_at"):
            self.note(started_at=self.before["started_at"])
        with self.kept():
            write_json(self.folder / "summary.json", finite(self.summary))
            self.attempt("the report", self._write_report)  # it is made from the summary

    def _write_report(self) -> None:
        with self.kept():
            write_report(self.folder)


def settings_of_run(cuda: bool) -> Settings:
    """From presets and environment, or from the interrupted run that RESUME names."""
    resume = given_settings(os.environ).get("resume")
    if not resume:
        return load_settings(cuda=cuda)
    folder = Path(resume)
    path = folder / "settings.json"
    for name, there in ((CHECKPOINT, checkpoint.candidates(folder)), (path.name, os.path.isfile(path))):
        if not there:
            raise UserError(f"RESUME={folder}: no {name} there; name the folder of an interrupted run")
    saved = read_settings(path)
    asked = load_settings(preset=saved.preset, cuda=cuda).model_dump(exclude={"run_id", "out_dir", "resume"})
    preset = Settings(**{"preset": saved.preset, **PRESETS.get(saved.preset, {})}).model_dump()
    for name, value in asked.items():
        if value not in (getattr(saved, name), preset[name]):
            raise UserError(
                f"{name.upper()}={value}: {folder} was begun with {getattr(saved, name)}; it keeps its settings"
            )
    return saved.model_copy(update={"resume": str(folder), "out_dir": str(folder.parent), "run_id": folder.name})
