"""bench/studies/attacks/bad_input.py: a part of its kinds, and that it sees what a command must not do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")
sys.path.append(str(Path(__file__).parents[2] / "bench" / "studies"))
from bench.studies.attacks.bad_input import KINDS, changed, judge
from bench.studies.attacks.calls import Call
from bench.studies.attacks.outcomes import ROOT

LONG = (
    "RESUME",
    "RUN_ID twice",
    "rates",
    "more than",
    "time for",
    "training tokens",
    "artifact",
    "prepared",
    "settings.json",
)


def test_bad_input_of_many_kinds_is_refused(tmp_path):
    numbers = [number for number, name in enumerate(KINDS) if not name.startswith(LONG)][::5]
    assert len(numbers) > 20
    start = "from pathlib import Path; from bench.studies.attacks.bad_input import attempts"
    work = f"{start}; attempts(Path.cwd(), {numbers})"
    done = subprocess.run(
        [sys.executable, "-c", work],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [int(line[0]) for line in lines] == [number for number in numbers for _ in range(2)]
    assert [line for line in lines if line[1:] and line[1] != "refused"] == []


CALL = Call(("eval", "x"), "x.bin")


@pytest.mark.parametrize(
    ("status", "out", "err", "changes", "outcome"),
    [
        (2, b"", b"pgolf: x.bin: wrong\n", [], "refused"),
        (0, b"fine\n", b"", [], "crash"),
        (1, b"", b"Traceback (most recent call last):\n...\nValueError: x.bin\n", [], "crash"),
        (2, b"", b"x.bin: wrong\nx.bin: and more\n", [], "crash"),
        (2, b"", b"x.bin: no end", [], "crash"),
        (2, b"", b"", [], "crash"),
        (2, b"", b"pgolf: x.bin" + b"x" * 300 + b"\n", [], "crash"),
        (2, b"", b"pgolf: x.bin \x1b[2J\n", [], "crash"),
        (2, b"\x1b[2J", b"pgolf: x.bin\n", [], "crash"),
        (2, b"", b"pgolf: y.bin\n", [], "crash"),
        (3, b"", b"pgolf: x.bin\n", [], "crash"),
        (-signal.SIGSEGV, b"", b"", [], "crash"),
        (-signal.SIGALRM, b"", b"", [], "hang"),
        (2, b"", b"pgolf: out of memory (x.bin)\n", [], "too much memory"),
        (1, b"", b"Traceback\nMemoryError\n", [], "too much memory"),
        (2, b"", b"pgolf: x.bin: wrong\n", ["model.pgolf"], "lost run"),
    ],
)
def test_what_a_command_must_not_do(status, out, err, changes, outcome):
    assert judge(CALL, status, out, err, changes)[0] == outcome


def test_files_that_are_gone_others_or_half_written():
    before = {"kept": "1", "other": "2", "gone": "3"}
    after = {"kept": "1", "other": "4", "new/a": "5", "new/.b.tmp": "6", "more": "7"}
    assert changed(before, after, ("new/*",)) == ["gone", "more", "new/.b.tmp", "other"]
    assert changed(before, before, ()) == []
