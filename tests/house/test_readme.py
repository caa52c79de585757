"""The README's code and commands work as they stand."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUN_COMMAND, TEST_COMMAND = COMMANDS[:2]


@pytest.fixture(scope="module")
def as_a_user(tmp_path_factory):
    """(folder with train_gpt.py, environment): `pgolf`, `python` and `torchrun` are those of this interpreter."""
    folder = tmp_path_factory.mktemp("user")
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("pgolf", "-m pgolf"), ("torchrun", "-m torch.distributed.run")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    shutil.copy(ROOT / "train_gpt.py", folder)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return folder, environ


def run(command: str, as_a_user, **more: str) -> str:
    folder, environ = as_a_user
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**environ, **more}, capture_output=True, text=True, timeout=220
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_examples_run(block, as_a_user):
    assert "loss" in run(f"python - <<'END'\n{block}\nEND", as_a_user)


def test_the_first_command_trains_quantises_and_scores(as_a_user):
    """As it stands but for the installation, which continuous integration does; a smaller model, three steps."""
    install, train = RUN_COMMAND.split(" && ")
    assert install == "pip install -e . -c constraints.txt"
    output = run(train, as_a_user, ITERATIONS="3", MODEL_DIM="64", NUM_LAYERS="2", RUN_ID="readme", OMP_NUM_THREADS="1")
    assert "final_artifact_roundtrip_exact" in output
    folder = as_a_user[0] / "runs" / "readme"
    assert (folder / "report.html").exists()
    assert (folder / "summary.json").exists()


def test_the_second_command_is_what_continuous_integration_runs():
    assert TEST_COMMAND == "pip install -e '.[test]' -c constraints.txt && pytest -q -n auto"
    script = ROOT / ".ci" / "run"
    if script.exists():  # only the repository has it
        assert "grep -F \"pip install -e '.[test]'\" README.md" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith(("pgolf doctor", "pgolf size --preset"))]
)
def test_commands_that_only_look(command, as_a_user):
    assert run(command, as_a_user).strip()


def test_data_commands(as_a_user):
    for command in COMMANDS:
        if command.startswith(("pgolf data demo", "pgolf data inspect")):
            assert run(command, as_a_user).strip()
    own = as_a_user[0] / "my-texts"
    own.mkdir()
    for path in (ROOT / "pgolf").rglob("*.py"):
        shutil.copy(path, own / f"{path.stem}.txt")
    (command,) = (line for line in COMMANDS if line.startswith("pgolf data tokenize"))
    run(command.partition("#")[0] + "--vocab-size 512", as_a_user)
    assert list((as_a_user[0] / "data" / "datasets" / "mine").glob("*_train_*.bin"))


def test_every_other_command_is_at_least_a_known_one(capsys):
    """Those that need a GPU, the network or an older run: their options exist."""
    from pgolf.cli import main

    for line in COMMANDS:
        if line.startswith("pgolf"):
            words = line.partition("#")[0].split()[1:]
            command = words[:2] if words[0] == "data" else words[:1]
            with pytest.raises(SystemExit) as stop:
                main([*command, "--help"])
            assert stop.value.code == 0
            usage = capsys.readouterr().out
            assert all(word in usage for word in words if word.startswith("--")), line


def test_settings_in_the_commands_exist():
    from pgolf.settings import PRESETS, Settings

    for name, value in re.findall(r"\b([A-Z_]{4,})=([^\s`|]+)", "\n".join(COMMANDS)):
        assert name.lower() in Settings.model_fields, name
        if name == "PRESET":
            assert value in PRESETS


def test_links_to_files_are_good():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
