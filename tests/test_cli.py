"""The `pgolf` command: its answers, and one line with status 2 for what it cannot use."""

import json
import subprocess
import sys

import pytest
import torch

from pgolf.cli import main
from pgolf.cli.eval import scoring_of
from pgolf.errors import PgolfError
from pgolf.files import make_folder, write_json
from pgolf.model import Model, ModelConfig
from pgolf.settings import PRESETS, load_settings
from pgolf.size import entropy_bits, projected_bytes


def test_size_of_the_baseline(capsys):
    assert main(["size", "--preset", "baseline", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == 17_059_912
    assert result["budget_bytes"] == 16_000_000
    assert result["fits_budget"] is True
    assert result["projected_artifact_bytes"] == sum(result["projected_bytes_by_role"].values())
    assert sum(result["parameters_by_role"].values()) == 17_059_912


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_size_as_text_names_every_role(preset, capsys):
    assert main(["size", "--preset", preset]) == 0
    text = capsys.readouterr().out
    for role in ("embedding", "attention", "mlp", "control", "container", "code", "left"):
        assert role in text


def test_size_follows_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("BUDGET_BYTES", "1000000")
    assert main(["size", "--preset", "baseline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits_budget"] is False


def test_size_knows_artifact_bytes(capsys, monkeypatch):
    monkeypatch.setenv("ARTIFACT_BYTES", "15800000")
    assert main(["size", "--preset", "baseline", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["projected_artifact_bytes"] == 15_800_000
    assert result["projected_bytes_at_clip_sigmas"] == sum(result["projected_bytes_by_role"].values()) < 15_800_000
    assert result["projected_total_bytes"] == 15_800_000 + result["code_bytes"]
    assert main(["size", "--preset", "baseline"]) == 0
    assert "fitted" in capsys.readouterr().out


def test_size_from_the_weights_of_a_run(tmp_path, capsys, tiny_environ):
    settings = load_settings({**tiny_environ, "RUN_ID": "run", "OUT_DIR": str(tmp_path)})
    folder = make_folder(tmp_path / "run")
    write_json(folder / "settings.json", settings.model_dump())
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(0))
    ema = {"average": [parameter.detach() for parameter in model.parameters()], "updates": 3}
    torch.save({"model": model.state_dict(), "ema": ema}, folder / "checkpoint.pt")
    assert main(["size", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["from_weights"] is True
    assert result["projected_bytes_by_role"] == projected_bytes(model.named_parameters(), settings)
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    assert main(["size", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_entropy_of_gaussian_rows_is_the_measured_one():
    # Bits a weight measured on a million Gaussian int6 weights, clipped at 12.85 and at 11.5 sigmas.
    assert entropy_bits(6, 12.85) == pytest.approx(3.328, abs=0.001)
    assert entropy_bits(6, 11.5) == pytest.approx(3.487, abs=0.002)
    assert entropy_bits(2, 100.0) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["size", "--preset", "huge"], "huge"),
        (["eval", "nowhere"], "nowhere"),
        (["size", "nowhere"], "nowhere"),
        (["size", "nowhere", "--preset", "demo"], "--preset"),
        (["artifact", "show", "nowhere"], "nowhere"),
        (["data", "inspect", "nowhere"], "nowhere"),
        (["data", "tokenize", "nowhere.txt", "--out", "x"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("pgolf: ")
    assert named in output.err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["size", "--colour"], ["data"], ["data", "download", "--variant", "x"], ["artifact"]]
)
def test_bad_usage_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error


def test_eval_wants_to_know_the_data_of_a_lonely_artifact(tmp_path, capsys):
    path = tmp_path / "model.pgolf"
    path.write_bytes(b"")
    assert main(["eval", str(path)]) == 2
    assert "--data-path" in capsys.readouterr().err


def test_a_damaged_artifact_is_one_line(tmp_path, capsys, tiny_data):
    path = tmp_path / "model.pgolf"
    path.write_bytes(b"not an artifact")
    assert main(["eval", str(path), "--data-path", str(tiny_data[0]), "--tokenizer-path", str(tiny_data[1])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.pgolf" in error


def test_an_artifact_is_scored_as_it_wants_or_as_the_line_says():
    stored = {"seq_len": 64, "stride": 16, "bos_id": 1}
    assert scoring_of(stored, None, None) == stored
    assert scoring_of(stored, 32, None) == {"seq_len": 32, "stride": 0, "bos_id": 1}
    assert scoring_of(stored, 32, 8) == {"seq_len": 32, "stride": 8, "bos_id": 1}
    assert scoring_of(None, 32, None) == {"seq_len": 32, "stride": 0, "bos_id": None}
    for wrong in (None, 7, {}, {"seq_len": 0}, {"seq_len": True}, {"seq_len": 8, "stride": 9}, {"seq_len": 8, "x": 1}):
        with pytest.raises(PgolfError, match=r"--seq-len|--stride|metadata"):
            scoring_of(wrong, None, None)
    with pytest.raises(PgolfError, match="metadata"):
        scoring_of({**stored, "bos_id": [1]}, None, None)


def test_the_command_needs_no_torch_to_say_what_is_wrong(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken here')")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pgolf.cli import main; main(['doctor'])",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr
    assert "torch is broken here" in result.stdout
