"""Bad input through the front doors: `train_gpt.py` and every `pgolf` command, each attempt in a process of its own.

A kind of bad input (`KINDS`) spoils a copy of a small project and says how the command is called on it. As promised is:
the status, exactly one line on standard error that a terminal can show and that names what is wrong, and a project in
which nothing is lost and nothing half written. An attempt has so much memory and time as any other.
"""

import contextlib
import ctypes
import fnmatch
import hashlib
import importlib
import itertools
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from bench.studies.attacks.bad_data import KINDS as DATA
from bench.studies.attacks.bad_files import KINDS as FILES
from bench.studies.attacks.bad_settings import KINDS as SETTINGS
from bench.studies.attacks.calls import Call
from bench.studies.attacks.outcomes import HANG_SECONDS, MEMORY_BYTES, ROOT, watch
from bench.studies.attacks.small_project import make_project

KINDS = {**SETTINGS, **FILES, **DATA}
MOST_LETTERS = 300  # of a line
ATTEMPT_SECONDS = HANG_SECONDS / 2
LARGE = 1 << 26  # bytes
PR_SET_PDEATHSIG = 1
# Imported before the first attempt, so that none waits for it, nor wants for it as a user who may not read this Python.
HEAVY = (
    "torch",
    "train_gpt",
    "pgolf.cli",
    "pgolf.artifact.import_checkpoint",
    "pgolf.data.download",
    "pgolf.quantization.size",
    "pgolf.run.figures",
    "torch._dynamo",
    "encodings.unicode_escape",  # of the report's template
)


def bad_input(seconds: float, seed: int) -> Counter[str]:
    """Kind number seed % len(KINDS), varied by the seed; the seeds that follow are all the other kinds."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "bench.studies.attacks.bad_input", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
        return watch("bad_input", lambda at: [*start, str(at)], seconds, seed, environment)


def attempts(folder: Path, seeds: Iterable[int]) -> None:
    """The process that `bad_input` watches."""
    sys.path.insert(0, str(ROOT))
    for module in HEAVY:
        importlib.import_module(module)
    project, names = folder / "project", list(KINDS)
    if not (project / "runs" / "good" / "summary.json").exists():
        shutil.rmtree(project, ignore_errors=True)
        make_project(project)
    for seed in seeds:
        print(seed, flush=True)
        name = names[seed % len(names)]
        outcome, what = attempt(name, project, folder, seed)
        print(seed, outcome.replace(" ", "_"), f"{name}: {what}", flush=True)


def attempt(name: str, project: Path, folder: Path, seed: int) -> tuple[str, str]:
    """The outcome of one bad input, and a word on it."""
    copy = folder / "copy"
    folder.chmod(0o711)  # or a command as nobody could not follow the path to its own folder
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
    shutil.copytree(project, copy)
    here = Path.cwd()
    try:
        os.chdir(copy)
        call = KINDS[name](random.Random(seed))
        before = tree()
        status, out, err = in_child(call, folder)
        after = tree()
    finally:
        os.chdir(here)
        for path in copy.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(copy)
    missing = [f"{name} (missing)" for name in call.leaves if name not in after]
    return judge(call, status, out, err, changed(before, after, call.may_change) + missing)


def tree() -> dict[str, str]:
    """What lies in the current folder: names, with hashes of ordinary files (of giants the size)."""
    found = {}
    for path in sorted(Path().rglob("*")):
        found[str(path)] = ""
        if path.is_file() and not path.is_symlink():
            size = path.stat().st_size
            found[str(path)] = str(size) if size > LARGE else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changed(before: dict[str, str], after: dict[str, str], may_change: tuple[str, ...]) -> list[str]:
    """Files that are gone, others, or new, but for those that may."""
    different = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    torn = [name for name in after if name.endswith(".tmp")]
    return sorted({*torn, *(name for name in different if not any(fnmatch.fnmatch(name, each) for each in may_change))})


def in_child(call: Call, folder: Path) -> tuple[int, bytes, bytes]:
    """(exit status or minus the signal, standard output, standard error) of the command, in a process just forked."""
    rival = 0
    if call.rival:
        rival = os.fork() or become(call, folder / "rival_out", folder / "rival_err")
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while not Path(call.rival).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    child = os.fork() or become(call, folder / "out", folder / "err")
    status = ended(child)
    if rival and ended(rival):
        return 1, b"", b"Traceback: of the process that was first\n"
    return status, (folder / "out").read_bytes(), (folder / "err").read_bytes()


def ended(child: int) -> int:
    """Its exit status; minus SIGALRM where it had to be ended."""
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def become(call: Call, out: Path, err: Path) -> NoReturn:
    """This process, just forked, is the command, and ends with the one that forked it."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="backslashreplace") for number in (1, 2))
        os.environ.update(call.environ)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        call.before()
        if call.as_nobody and os.geteuid() == 0:
            os.seteuid(65534)
        status = run(call)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run(call: Call) -> int:
    from pgolf.cli import main

    if call.words[0] != "train_gpt.py":
        return main(list(call.words))
    sys.argv = [str(ROOT / "train_gpt.py"), *call.words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def judge(call: Call, status: int, out: bytes, err: bytes, changes: list[str]) -> tuple[str, str]:
    """What came of it, and a word on that."""
    lines = err.decode("utf-8", "backslashreplace").split("\n")
    line, rest = lines[0], lines[1:]
    if status == -signal.SIGALRM:
        return "hang", f"{ATTEMPT_SECONDS:g} s"
    if ("out of memory" in line or "MemoryError" in lines[-2:][0]) and not call.may_lack_memory:
        return "too much memory", lines[-2:][0]
    if status < 0 or "Traceback" in err.decode("utf-8", "replace"):
        return "crash", f"status {status}: {lines[-2] if len(lines) > 1 else ''}"
    if status not in call.status:
        return "crash", f"status {status}: {line}"
    wanted = status not in call.silent
    if not wanted:
        lines = [each for each in lines if not each.startswith("train_gpt.py: warning: ")]
        line, rest = lines[0], lines[1:]
    if (wanted and rest != [""]) or (not wanted and line) or len(line) > MOST_LETTERS:
        return "crash", f"{len(lines) - 1} lines on standard error, the first of {len(line)} letters: {line}"
    shown = line + out.decode("utf-8", "backslashreplace").replace("\n", "")
    if not shown.isprintable():
        return "crash", f"not printable: {ascii(shown)[:200]}"
    if call.named not in line + (shown if not wanted else ""):
        return "crash", f"{call.named!r} is not named: {line}"
    if changes:
        return "lost run", f"status {status}, changed: {', '.join(changes)[:200]}"
    return ("refused" if status else "valid"), line


if __name__ == "__main__":
    importlib.import_module("pgolf.artifact.packed_code").pack_code()  # seconds, which no run has to spend then
    attempts(Path(sys.argv[1]), itertools.count(int(sys.argv[2])))
