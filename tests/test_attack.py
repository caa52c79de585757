"""bench/studies/attack.py: what it counts, and that it names the seed of what went wrong."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")
sys.path.append(str(Path(__file__).parent.parent / "bench" / "studies"))
from attacks import artifacts, outcomes


def test_outcomes_of_a_process_that_dies(capfd):
    found = outcomes.watch(
        "a trial", lambda seed: ["sh", "-c", f"echo {seed}; echo {seed} refused; echo 77; kill -9 $$"], 0.5, 3
    )
    assert found["crash"] == found["refused"] > 0
    assert "seed 77: crash: status -9" in capfd.readouterr().err


def test_outcomes_of_a_process_that_hangs(capfd, monkeypatch):
    monkeypatch.setattr(outcomes, "HANG_SECONDS", 0.2)
    found = outcomes.watch("a trial", lambda seed: ["sh", "-c", f"echo {seed}; exec sleep 60"], 0.5, 3)
    assert found["hang"] > 0
    assert found.total() == found["hang"]
    assert "seed 3: hang" in capfd.readouterr().err


def test_mutants_of_a_model_are_refused_or_valid(tmp_path):
    artifacts.write_good_artifact(tmp_path / "good.pgolf")
    assert artifacts.read_and_build(tmp_path / "good.pgolf") == ("valid", "")
    whole, trial, outcomes = (tmp_path / "good.pgolf").read_bytes(), tmp_path / "trial.pgolf", []
    for seed in range(60):
        trial.write_bytes(artifacts.mutant(whole, seed))
        outcomes.append(artifacts.read_and_build(trial)[0])
    assert set(outcomes) == {"refused", "valid"}
