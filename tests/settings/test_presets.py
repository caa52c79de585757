"""Every preset: its published size, and a run from data to scored artifact at a width that takes a second."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from pgolf.artifact.packed_code import code_bytes
from pgolf.cli import main
from pgolf.data.dataset import open_dataset
from pgolf.errors import DataError
from pgolf.model import Model, ModelConfig
from pgolf.presets import FINEWEB, PRESETS, how_to_get
from pgolf.quantization.size import projected_size
from pgolf.run.record import Run
from pgolf.runtime.ranks import Ranks
from pgolf.settings import default_preset, load_settings

# Printed as model_params in the systems' own logs; recurrent8 published none.
PUBLISHED = {
    "baseline": 17_059_912,
    "pr66": 21_778_504,
    "dense4096": 34_401_371,
    "pr1493": 35_944_536,
    "pr1855": 35_945_671,
    "record": 35_945_673,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_are_as_many_as_published(preset, capsys):
    assert main(["size", "--preset", preset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == PUBLISHED[preset]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_fits_into_its_budget_with_the_code(preset):
    settings = load_settings({"PRESET": preset})
    assert settings.artifact_bytes + code_bytes() <= settings.budget_bytes
    assert projected_size(settings)["fits_budget"]


def test_a_model_has_the_parameters_that_its_size_tells():
    config = ModelConfig.of(load_settings({"PRESET": "record"}))
    with torch.device("meta"):
        assert sum(p.numel() for p in Model(config).parameters()) == config.parameters()


def test_the_record_has_its_mask_on():
    assert load_settings({"PRESET": "record"}).smear_gate_bos_fix


def tiny_settings(preset, tiny_environ, folder):
    values = PRESETS[preset]
    small = {
        "PRESET": preset,
        "OUT_DIR": str(folder),
        "RUN_ID": preset,
        "NUM_HEADS": "4",
        "NUM_KV_HEADS": "2",
        "NUM_LAYERS": str(values.get("num_layers", 9)),
        "ITERATIONS": "2",
        "GPTQ_CALIBRATION_BATCHES": "1",
        "VAL_LOSS_EVERY": "0",
        "TRAIN_SEQ_LEN": "64",
        "VE_DIM": "8",
        "ROPE_DIMS": "4" if values.get("rope_dims") else "0",
        "ROPE_TRAIN_SEQ_LEN": "64",
        "EVAL_SEQ_LEN": "80" if values.get("eval_seq_len") else "0",
        "EVAL_STRIDE": "32" if values.get("eval_stride") else "0",
        "ENABLE_LOOPING_AT": "0.5",
        "ARTIFACT_BYTES": "0",
        "QUANTIZER": "rtn",
    }
    return load_settings({**tiny_environ, **small})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_narrow_run(preset, tiny_environ, tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    train_gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_gpt)
    monkeypatch.setattr(train_gpt, "compressors_bpb", lambda data: {})  # both are other tests' business,
    monkeypatch.setattr("pgolf.run.record.write_report", lambda folder: None)  # and slow
    settings, ranks = tiny_settings(preset, tiny_environ, tmp_path), Ranks(0, 1, torch.device("cpu"))
    with Run(settings, ranks) as run:
        train_gpt.run_training(settings, ranks, run)
    summary = json.loads((tmp_path / preset / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    # two steps teach nothing; what counts is that the artifact is the model that was trained
    assert summary["val_bpb_quantized"] == pytest.approx(summary["val_bpb_float"], rel=0.05)
    assert 0 < summary["val_bpb_float"] < 20


def test_where_its_data_is_missing_a_preset_names_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"PRESET": "baseline"})
    command = "`pgolf data download --variant sp1024` fetches 80 training shards of 200 MB"
    with pytest.raises(DataError, match=f"^DATA_PATH={settings.data_path}: no such folder; {command}"):
        open_dataset(settings, Ranks(0, 1, torch.device("cpu")))
    assert "pgolf data --help" in how_to_get("my/own/shards")


def test_with_a_gpu_the_best_system_whose_data_is_there_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_preset(cuda=True) == "demo"
    for variant, preset in (("sp1024", "baseline"), ("sp8192", "pr1493"), ("caseops", "record")):
        (tmp_path / FINEWEB[variant]).mkdir(parents=True)
        (tmp_path / FINEWEB[variant] / "fineweb_train_000000.bin").touch()
        assert default_preset(cuda=True) == preset
        assert Path(load_settings({}, cuda=True).data_path) == Path(FINEWEB[variant])
    assert default_preset(cuda=False) == "demo"
