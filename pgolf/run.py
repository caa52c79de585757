"""The record of one run: its folder, log, metrics and summary, and what happens when it is interrupted.

Only the first rank writes. Every file is valid at any moment: whole files are replaced by renaming, logs are appended
line by line.
"""

import json
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

import pgolf
from pgolf import ops
from pgolf.checkpoint import CHECKPOINT
from pgolf.distributed import Ranks
from pgolf.errors import PgolfError, UserError
from pgolf.evaluate import Score
from pgolf.files import make_folder, write_json
from pgolf.machine import cpu_name
from pgolf.report import write_report
from pgolf.settings import PRESETS, Settings, given_settings, load_settings, validate

# In the order of the documentation; unknown until measured, so that an interrupted run's summary has every field.
SUMMARY_FIELDS = (  # noqa: SIM905
    "run_id preset seed device device_name world_size parameters steps tokens_seen train_seconds step_ms "
    "tflop_per_s peak_memory_bytes "
    "val_loss_float val_bpb_float val_loss_quantized val_bpb_quantized val_bpb_ngram val_tokens val_bytes "
    "artifact_bytes projected_artifact_bytes code_bytes code_bytes_raw "
    "total_bytes budget_bytes fits_budget bytes_by_role seconds "
    "max_wallclock_seconds wallclock_used_seconds within_wallclock max_eval_seconds within_eval "
    "compressors_bpb backends fallbacks attention compile cuda_graphs recompilations dtype interrupted aborted versions"
).split()
OPTIONAL_FIELDS = ("mfu",)  # of devices whose peak is known


class Interrupted(BaseException):
    """SIGINT or SIGTERM came."""


class Aborted(PgolfError):
    """The early validation was worse than ABORT_BPB. The run ends with status 3, its summary written."""


class Run:
    """Use as a context: it opens the folder, catches the two signals, and leaves a valid summary and report behind."""

    def __init__(self, settings: Settings, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
        self.folder = Path(os.fsdecode(ranks.agree_bytes(os.fsencode(settings.run_folder))))  # its name has the time
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.summary: dict[str, Any] = dict.fromkeys(SUMMARY_FIELDS)
        self.signal: int | None = None
        self.deferring = False
        cuda = ranks.device.type == "cuda"
        self.note(
            run_id=settings.run_id,
            preset=settings.preset,
            seed=settings.seed,
            device=ranks.device.type,
            device_name=torch.cuda.get_device_name() if cuda else cpu_name(),
            world_size=ranks.world_size,
            budget_bytes=settings.budget_bytes,
            max_wallclock_seconds=settings.max_wallclock_seconds,
            max_eval_seconds=settings.max_eval_seconds,
            interrupted=False,
            aborted=False,
            versions=versions(),
        )

    def __enter__(self) -> "Run":
        if self.ranks.first:
            make_folder(self.folder)
            if (self.folder / "settings.json").exists() and not self.settings.resume:
                raise UserError(
                    f"RUN_ID={self.settings.run_id}: {self.folder} holds a run already; choose another name"
                )
            write_json(self.folder / "settings.json", self.settings.model_dump())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        for name, value in sorted(self.settings.model_dump().items()):
            self.log(f"setting {name}:{value}", console=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):
            self.note(interrupted=True)
            self.close()
            if (self.folder / CHECKPOINT).exists():
                self.log(f"interrupted; go on with RESUME={self.folder}")
            else:
                self.log("interrupted before training began; nothing to resume")
            sys.exit(128 + (self.signal or signal.SIGTERM))
        if isinstance(error, Aborted):
            self.note(aborted=True)
            self.close()
            self.log(f"aborted: {error}")
            sys.exit(3)
        if isinstance(error, PgolfError):
            self._forget()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # torchrun repeats what the terminal sent
            return
        self.signal = number
        if not self.deferring:
            raise Interrupted

    def _forget(self) -> None:
        """Leave no folder behind for a run that was refused before it did anything."""
        if self.ranks.first and {path.name for path in self.folder.iterdir()} <= {"settings.json", "train.log"}:
            shutil.rmtree(self.folder)

    @contextmanager
    def deferring_signals(self):
        """Inside, a signal only sets `signal`, for a loop that stops between two steps; at the end it takes effect."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.signal is not None:
            raise Interrupted

    @contextmanager
    def timed(self, name: str):
        """Add the block's wall-clock seconds to `seconds[name]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def log(self, line: str, console: bool = True) -> None:
        if not self.ranks.first:
            return
        if console:
            print(line, flush=True)
        with open(self.folder / "train.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def metric(self, kind: str, **values: float) -> None:
        if self.ranks.first:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **values}) + "\n")

    def log_score(self, step: int, score: Score, train_seconds: float) -> None:
        """A validation in the community's words, and as a metric."""
        self.log(
            f"step:{step}/{self.settings.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
            f"train_time:{1000 * train_seconds:.0f}ms step_avg:{1000 * train_seconds / max(step, 1):.2f}ms"
        )
        self.metric("val", step=step, val_loss=score.loss, val_bpb=score.bpb, train_seconds=train_seconds)

    def note(self, **values: Any) -> None:
        """Set fields of the summary."""
        unknown = values.keys() - {*SUMMARY_FIELDS, *OPTIONAL_FIELDS}
        assert not unknown, unknown
        self.summary.update(values)

    def close(self) -> None:
        """Write summary and report."""
        self.seconds["total"] = time.perf_counter() - self.started
        if not self.ranks.first:
            return
        self.note(backends=ops.used(), fallbacks=ops.fallbacks())
        self.note(seconds={name: round(value, 3) for name, value in self.seconds.items()})
        write_json(self.folder / "summary.json", self.summary)
        write_report(self.folder)


def settings_of_run(cuda: bool) -> Settings:
    """From presets and environment, or from the interrupted run that RESUME names."""
    resume = given_settings(os.environ).get("resume")
    if not resume:
        return load_settings(cuda=cuda)
    folder = Path(resume)
    path = folder / "settings.json"
    if not (folder / CHECKPOINT).is_file() or not path.is_file():
        raise UserError(f"RESUME={folder}: no {CHECKPOINT} there; name the folder of an interrupted run")
    saved = read_settings(path)
    asked = load_settings(preset=saved.preset, cuda=cuda).model_dump(exclude={"run_id", "out_dir", "resume"})
    preset = Settings(**{"preset": saved.preset, **PRESETS.get(saved.preset, {})}).model_dump()
    for name, value in asked.items():
        if value not in (getattr(saved, name), preset[name]):
            raise UserError(
                f"{name.upper()}={value}: {folder} was begun with {getattr(saved, name)}; it keeps its settings"
            )
    return saved.model_copy(update={"resume": str(folder), "out_dir": str(folder.parent), "run_id": folder.name})


def read_settings(path: Path) -> Settings:
    try:
        return validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the settings of a run ({error})") from None


def versions() -> dict[str, str]:
    found = {"pgolf": pgolf.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "sentencepiece", "brotli", "zstandard"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
