"""`pgolf settings` and `pgolf presets`: all there is, one in full, and as JSON."""

import json
import os

import pytest

from pgolf.cli import main
from pgolf.presets import PRESETS, SYSTEMS
from pgolf.settings import NAMES, Settings


def test_all_settings_are_listed_with_defaults_and_texts(capsys):
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in lines] == [name.upper() for name in Settings.model_fields]
    assert "WARMDOWN_FRAC=0.08" in "\n".join(lines)
    assert main(["settings", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == NAMES
    assert all(row["text"] and row["accepted"] for row in rows)


def test_one_setting_is_told_in_full_and_a_part_of_a_name_finds_all(capsys):
    assert main(["settings", "muon_backend_steps"]) == 0
    assert capsys.readouterr().out == "MUON_BACKEND_STEPS: Newton-Schulz steps\ndefault: 5\naccepted: 1 to 100\n"
    assert main(["settings", "matrix_lr"]) == 0
    assert "record 0.028" in capsys.readouterr().out
    assert main(["settings", "EMA"]) == 0
    assert capsys.readouterr().out.startswith("EMA_DECAY: ")
    assert main(["settings", "MUON"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5
    assert main(["settings", "COLOUR"]) == 2
    assert capsys.readouterr().err == "pgolf: COLOUR: no such setting, and none with that in its name\n"


def test_the_command_lets_waiting_threads_sleep(monkeypatch, capsys):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert main(["presets"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert main(["presets"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_presets_are_listed_with_what_each_changes(capsys):
    assert PRESETS.keys() == SYSTEMS.keys()
    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)
    assert main(["presets", "record", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["settings"] == PRESETS["record"]
    assert main(["presets", "huge"]) == 2
    assert "accepted are baseline" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_lists_its_changes_as_variables(preset, capsys):
    assert main(["presets", preset]) == 0
    changed = [line.split("=")[0].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    different = [n for n, value in PRESETS[preset].items() if value != Settings.model_fields[n].default]
    assert changed == [name.upper() for name in different]
