"""The `pgolf` command: its answers, and one line with status 2 for what it cannot use."""

import json
import subprocess
import sys

import pytest
from small_trainer import make_trainer, no_score

from pgolf.artifact import StoredTensor, write_artifact
from pgolf.cli import main
from pgolf.errors import PgolfError
from pgolf.evaluation.stored_scoring import scoring_of
from pgolf.model import Model, ModelConfig, role_of
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.size import entropy_bits, projected_bytes
from pgolf.runtime.files import write_json
from pgolf.settings import PRESETS, load_settings


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


@pytest.mark.parametrize("average", [{}, {"EMA_DECAY": "0.5"}, {"EMA_DECAY": "0", "SWA_EVERY": "1"}])
def test_size_from_the_weights_that_training_saved(tmp_path, capsys, average):
    trainer = make_trainer(tmp_path, **average, ITERATIONS="2")
    write_json(tmp_path / "settings.json", trainer.settings.model_dump())
    trainer.warm_up()
    trainer.train(no_score)  # writes the checkpoint, then takes the average
    assert main(["size", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["from_weights"] is True
    assert result["projected_bytes_by_role"] == projected_bytes(
        trainer.model.named_parameters(), QuantizationConfig.of(trainer.settings)
    )
    write_json(tmp_path / "settings.json", {**trainer.settings.model_dump(), "num_layers": 4})
    (tmp_path / "other").mkdir()
    for folder, named in ((tmp_path, "not of the model that its settings.json"), (tmp_path / "other", "no run there")):
        assert main(["size", str(folder)]) == 2
        assert named in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert main(["size", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), "checkpoint.pt" in error) == (1, True)


def test_size_of_an_artifact_is_its_bytes(tmp_path, capsys, monkeypatch):
    config = ModelConfig.of(load_settings({"PRESET": "demo", "MODEL_DIM": "32", "VOCAB_SIZE": "320"}))
    tensors = [
        StoredTensor(name, role_of(name), x.shape, x, None, 32) for name, x in Model(config).state_dict().items()
    ]
    path = tmp_path / "model.pgolf"
    written = write_artifact(path, tensors, {"model": config.as_dict()}, mode="static")
    assert main(["size", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == sum(result["parameters_by_role"].values()) == config.parameters()
    assert sum(result["bytes_by_role"].values()) == result["artifact_bytes"] == written.total == path.stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert main(["size", str(path)]) == 0
    assert "bytes as they lie in the file" in capsys.readouterr().out
    monkeypatch.setenv("BUDGET_BYTES", "100000")
    assert main(["size", str(path)]) == 4
    assert "does not fit" in capsys.readouterr().out
    path.write_bytes(b"damaged")
    assert main(["size", str(path)]) == 2
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
