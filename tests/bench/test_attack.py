"""bench/studies/attack.py: what it counts, and that it names the seed of what went wrong."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("resource")
from bench.studies import attack
from bench.studies.attacks import artifacts, coverage, outcomes


def test_outcomes_of_a_process_that_dies(capfd):
    found = outcomes.watch(
        "a trial", lambda seed: ["sh", "-c", f"echo {seed}; echo {seed} refused; echo 77; kill -9 $$"], 0.5, 3
    )
    assert found["crash"] > 0
    assert found["refused"] - found["crash"] in (0, 1)  # the time can be over between the two
    assert "seed 77: crash: status -9" in capfd.readouterr().err


def test_outcomes_of_a_process_that_hangs(capfd, monkeypatch):
    monkeypatch.setattr(outcomes, "HANG_SECONDS", 0.2)
    found = outcomes.watch("a trial", lambda seed: ["sh", "-c", f"echo {seed}; exec sleep 60"], 0.5, 3)
    assert found["hang"] > 0
    assert found.total() == found["hang"]
    assert "seed 3: hang" in capfd.readouterr().err


LIVES = """
import contextlib, random, signal, sys
from pathlib import Path
from bench.studies.attacks import full_disk, kills, lives, ranks, sittings

home = Path(sys.argv[1])
sittings.preload()
life = lives.Life(home / "kills")
usual = lives.Usual(home, lambda life: iter([[life.train()]]))
assert {name for name, *_ in sittings.HOOKS} - {"tokenize"} <= usual.seconds.keys(), usual.seconds  # all are seen
for phase, number in (("quantization", signal.SIGKILL), ("report", signal.SIGTERM)):
    assert kills.strike(life, phase, number, random.Random(0), usual), life.problem()
    assert not life.problem()
life.end_well(usual, "two signals")

life = lives.Life(home / "ranks", PROCESS_TIMEOUT_SECONDS="1")
usual.seconds["data"] = 0.0
assert ranks.lose(life, "data", 1, signal.SIGSTOP, random.Random(0), usual).startswith("data, rank 1, SIGSTOP")
assert not life.problem()

(home / "kills").mkdir()
(home / "kills" / "runs").write_text("in the way")
with contextlib.suppress(lives.Lost):
    lives.Life(home / "kills").end_well(usual, "a file in the way")
    raise SystemExit("a run that cannot begin was taken for one that ended well")
print("through")
"""


def test_a_run_that_is_signalled_and_one_that_loses_a_rank(tmp_path):
    """A process of its own, for it forks."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", LIVES, tmp_path], env=environ, capture_output=True, text=True)
    assert done.stdout == "through\n", done.stderr + done.stdout


def test_mutants_of_a_model_are_refused_or_valid(tmp_path):
    artifacts.write_good_artifact(tmp_path / "good.pgolf")
    assert artifacts.read_and_build(tmp_path / "good.pgolf") == ("valid", "")
    whole, trial, outcomes = (tmp_path / "good.pgolf").read_bytes(), tmp_path / "trial.pgolf", []
    for seed in range(60):
        trial.write_bytes(artifacts.mutant(whole, seed))
        outcomes.append(artifacts.read_and_build(trial)[0])
    assert set(outcomes) == {"refused", "valid"}


def test_an_attack_without_its_tool_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(coverage.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["attack.py", "--only", "native_readers", "--seconds", "1"])
    assert attack.main() == 0
    said = capsys.readouterr()
    assert said.err.startswith("native_readers: left out: needs clang++")
    assert said.out.splitlines()[1].split() == ["native_readers", "left", "out"]


@pytest.mark.parametrize(
    ("kind", "said", "outcome", "cause"),
    [
        (
            "crash",
            "INFO: x\nwrong: a blob has two meanings\n==1== ERROR: libFuzzer: deadly signal\n",
            "crash",
            "a blob",
        ),
        ("crash", "a.cpp:3:1: runtime error: shift of 9\n", "crash", "runtime error: shift of 9"),
        ("crash", "==1==ERROR: AddressSanitizer: SEGV on 0x1\n", "crash", "AddressSanitizer: SEGV"),
        ("crash", "wrong: too much memory: read_blob allocates 9 bytes\n", "too much memory", "read_blob allocates"),
        ("timeout", "==1== ERROR: libFuzzer: timeout after 60 seconds\n", "hang", "timeout after 60"),
        ("oom", "==1== ERROR: libFuzzer: out-of-memory (used: 2048Mb)\n", "too much memory", "out-of-memory"),
    ],
)
def test_what_ends_a_run_of_the_fuzzer_is_told_with_its_bytes(tmp_path, capsys, kind, said, outcome, cause):
    artifact = tmp_path / f"coder-7-{kind}-0123"
    artifact.write_bytes(b"\0abc")
    found = Counter()
    coverage.tell("coder", 7, said, [artifact], found)
    assert found == {outcome: 1}
    line = capsys.readouterr().err
    assert line.startswith(f"native_readers, coder, seed 7: {outcome}: ")
    assert cause in line
    assert f"{artifact} AGFiYw==" in line
