"""The folder of one run: made for it alone, and held by it from beginning to end.

Whoever holds the lock of its `train.log` owns the folder; the system lets go of it however a process ends. A name that
the user chose belongs to one run for good, unless that run ended before it left anything to keep. A name that was made
here, from time, preset and seed, gets a suffix where it is taken.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf.errors import UserError
from pgolf.runtime.files import Lines, make_folder, missing_folders, read_json
from pgolf.training import checkpoint

ARTIFACT = "model.pgolf"
LEFTOVERS = ("metrics.jsonl", "summary.json", "report.html", "settings.json")  # the last tells of the others


class RunFolder:
    """`path`, locked, and `log`, its train.log. `notice` is what there is to tell about it; `made` are the folders that
    were not there before, the innermost first."""

    def __init__(self, path: Path, log: Lines, notice: str = "", made: Sequence[Path] = ()):
        self.path, self.log, self.notice, self.made = path, log, notice, made

    def forget(self) -> None:
        """Leave nothing of a run that was refused before it did anything."""
        self.log.close()
        if self.made:
            with contextlib.suppress(OSError):  # something else is there by now
                for name in ("settings.json", "train.log"):
                    (self.path / name).unlink(missing_ok=True)
                for folder in self.made:
                    folder.rmdir()


def claim(out_dir: str, run_id: str, default: str, resume: bool) -> RunFolder:
    """Take `out_dir`/`run_id` for a run, or, where no name was chosen, the first of `default`, `default`-2, ...

    `UserError` when the name belongs to another run, or to this one while another process works on it.
    """
    above = missing_folders(out_dir)
    parent = make_folder(out_dir)
    if not run_id:
        return _first_free(parent, default, above)
    path = parent / run_id
    made = [path, *above] if _mkdir(path) else []
    log = _locked_log(path)
    if log is None:
        raise UserError(f"RUN_ID={run_id}: a run is at work in {path}; wait for its end, or choose another name")
    for torn in path.glob(".*.tmp"):  # of a process that was killed while it wrote
        torn.unlink(missing_ok=True)
    if resume or not (path / "settings.json").exists():
        return RunFolder(path, log, made=made)
    if not nothing_to_keep(path):
        log.close()
        raise UserError(f"RUN_ID={run_id}: {path} holds a run already; choose another name")
    for name in LEFTOVERS:
        (path / name).unlink(missing_ok=True)
    return RunFolder(path, log, f"{path}: a run of this name ended before its first checkpoint; it begins again")


def default_name(preset: str, seed: int) -> str:
    """<time>-<preset>-s<seed>"""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}-s{seed}"


def read_summary(path: Path) -> dict[str, Any]:
    """The summary in a run's folder; {} where there is none that can be read."""
    try:
        found = read_json(path / "summary.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def nothing_to_keep(path: Path) -> bool:
    """Whether the run in `path` left neither checkpoint nor artifact, nor a result: it was not ended by a rule."""
    if checkpoint.candidates(path) or (path / ARTIFACT).exists():
        return False
    summary = read_summary(path)
    return not summary.get("aborted") and not summary.get("diverged")


def _first_free(parent: Path, name: str, above: list[Path]) -> RunFolder:
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        if _mkdir(path) and (log := _locked_log(path)):
            return RunFolder(path, log, made=[path, *above])
    raise AssertionError


def _mkdir(path: Path) -> bool:
    """Whether this process made it."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot make folder {path}: {error.strerror}") from None
    return True


def _locked_log(path: Path) -> Lines | None:
    """None when another process has it."""
    log = Lines(os.path.join(path, "train.log"))
    if log.lock():
        return log
    log.close()
    return None
