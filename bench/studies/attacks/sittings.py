"""Sittings of a run: each is `train_gpt.py` or `pgolf`, forked from a process that has imported everything, so that it
takes less than a second. It tells on a pipe which phase it is in.

What is made smaller than in a user's run is the model, the text, and the time until the ranks synchronise; what
writes files is as it is.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
import random
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.studies.attacks.outcomes import ROOT

SCRIPT = ROOT / "train_gpt.py"
# A phase begins where a function is called; when it returns, the next begins, or the one around it goes on (None).
HOOKS = (
    ("tokenize", "pgolf.data.prepare", "tokenize_files", "end"),
    ("data", "pgolf.data.dataset", "open_dataset", "model"),
    ("warm-up", "pgolf.training.trainer", "Trainer.warm_up", "training"),
    ("training", "pgolf.training.trainer", "Trainer.train", "calibration"),
    ("checkpoint", "pgolf.training.checkpoint", "save", None),
    ("quantization", "pgolf.quantization.quantize", "quantize_within_budget", "scoring"),
    ("artifact", "pgolf.artifact", "write_artifact", None),
    ("summary", "pgolf.run.record", "Run.close", "end"),
    ("report", "pgolf.run.record", "write_report", None),
)
TINY = {
    "PRESET": "demo",
    "RUN_ID": "one",
    "MODEL_DIM": "32",
    "NUM_LAYERS": "3",
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "256",
    "MICRO_BATCH_TOKENS": "256",
    "VAL_BATCH_SIZE": "512",
    "WARMUP_STEPS": "1",
    "ITERATIONS": "20",
    "MAX_WALLCLOCK_SECONDS": "10000",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_MINUTES": "0.0005",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "DTYPE": "float32",
    "DEVICE": "cpu",
    "PYTHONPATH": str(ROOT),
}
TRACES = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called")
SYNCHRONISE_SECONDS = 0.02
VAL_BYTES = 3000  # of the demo's validation text


def preload() -> None:
    """What every sitting would import, compute or make for itself, alike each time."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no thread may be there when this process forks
    from pgolf.run.entry import before_torch

    before_torch()
    runpy.run_path(str(SCRIPT), run_name="preload")
    for name in ("torch._dynamo", "torch.distributed", "pgolf.cli", "pgolf.run.figures", *(hook[1] for hook in HOOKS)):
        importlib.import_module(name)
    from pgolf.artifact import packed_code
    from pgolf.data import prepare
    from pgolf.runtime import clock

    packed_code._script = lambda: SCRIPT
    packed_code.code_files = functools.cache(packed_code.code_files)
    packed_code.pack_code()
    clock.SYNCHRONISE_SECONDS = SYNCHRONISE_SECONDS
    documents = made_up_documents()
    prepare.demo_documents = lambda: documents
    prepare.DEMO_VAL_BYTES = VAL_BYTES


def made_up_documents() -> list[str]:
    """Of words enough for the demo's vocabulary."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(900)]
    weights = [1 / (place + 3) for place in range(len(words))]
    return [" ".join(chance.choices(words, weights, k=200)) + "." for _ in range(40)]


class Sitting:
    """A child process. `phase` is the one that it was last seen in, at the latest when it was sent a signal."""

    def __init__(
        self,
        folder: Path,
        program: str,
        arguments: list[str],
        environ: dict[str, str],
        hook: Callable[[str], None] = lambda phase: None,
        stdout: Path | None = None,
        output: str = "output",
    ):
        """In `folder`; `program` is train_gpt.py or pgolf. `hook` is called in the child as each phase begins.
        `output`, a suffix of `folder`, gets what it says, less what goes to `stdout` where that is given."""
        self.phase, self.rest, self.output = "start", b"", folder.parent / f"{folder.name}.{output}"
        self.seen: list[tuple[str, float]] = []  # each phase with its begin
        self.signalled = float("inf")
        self.status: int | None = None
        self.marks, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(lambda: _work(folder, program, arguments, environ, write, hook), self.output, stdout)
        os.close(write)

    def until(self, phase: str, times: int = 1, seconds: float = 45.0) -> bool:
        """Wait until it has begun `phase` so many times; whether that came. TimeoutError after `seconds`."""
        end = time.monotonic() + seconds
        while times and self._read(end):
            times -= self.seen[-1][0] == phase
        return not times

    def _read(self, end: float) -> bool:
        """Take in one mark; False when the process has ended."""
        while b"\n" not in self.rest:
            with selectors.DefaultSelector() as selector:
                selector.register(self.marks, selectors.EVENT_READ)
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise TimeoutError
            data = os.read(self.marks, 1 << 12)
            if not data:
                return False
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        phase, begin = line.decode().rsplit(" ", 1)
        self.seen.append((phase, float(begin)))
        if float(begin) <= self.signalled:
            self.phase = phase
        return True

    def end(self, seconds: float = 45.0) -> int:
        """Its status, negative for a signal. TimeoutError when it has none after `seconds`; it is killed then."""
        end = time.monotonic() + seconds
        try:
            while self._read(end):
                pass
            while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(0.002)
        except TimeoutError:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        finally:
            os.close(self.marks)
        self.status = os.waitstatus_to_exitcode(found[1])
        return self.status

    def send(self, number: int) -> None:
        self.signalled = min(self.signalled, time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        return (self.said().strip().splitlines() or ["not a word"])[-1]

    def trace(self) -> str:
        """A word on an error that was not told in one line."""
        return self.last_line() if any(trace in self.said() for trace in TRACES) else ""


def _become(work: Callable[[], None], output: Path, stdout: Path | None) -> None:
    """In the child: never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no run outlives the attack
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 2)
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if stdout else handle, 1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # what Python does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        status = status or 1
    finally:
        os._exit(status)


def _work(
    folder: Path,
    program: str,
    arguments: list[str],
    environ: dict[str, str],
    marks: int,
    hook: Callable[[str], None],
) -> None:
    os.chdir(folder)
    os.environ.update(environ)
    around = ["start"]  # the phase of the main thread

    def begin(phase: str) -> None:
        os.write(marks, f"{phase} {time.monotonic()}\n".encode())
        hook(phase)

    def hooked(name: str, function: Callable, after: str | None) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            main = threading.current_thread() is threading.main_thread()
            outer = around[0]
            if main:
                around[0] = name
            begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                if main:
                    around[0] = after or outer
                begin(around[0])

        return call

    for name, module, path, after in HOOKS:
        *owners, last = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, last, hooked(name, getattr(owner, last), after))
    begin("start")
    if program == "pgolf":
        from pgolf.__main__ import main

        sys.argv = ["pgolf", *arguments]
        sys.exit(main())
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def in_a_child(question: Callable[[], str]) -> str:
    """The answer of a forked process, so that this one stays without threads."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, question().encode())
        except BaseException:
            os.write(write, traceback.format_exc().strip().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read().decode()
    os.waitpid(pid, 0)
    return answer


def real(folder: Path, environ: dict[str, str], launcher: Sequence[str] = ()) -> subprocess.Popen:
    """A sitting that imports everything for itself, where asked for under a `launcher`."""
    with open(folder.parent / f"{folder.name}.output", "wb") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT)],
            cwd=folder,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
