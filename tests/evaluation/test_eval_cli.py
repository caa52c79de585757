"""`pgolf eval`: a run is scored from any folder, with data that belong to it, or one line says why not."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.cli import main
from pgolf.data.prepare import tokenize_files
from pgolf.data.shards import find_shards, read_shard, write_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import UserError
from pgolf.model import Model, ModelConfig, role_of
from pgolf.run.record import settings_of_run
from pgolf.run.saved_settings import STARTED_IN, read_settings, write_settings
from pgolf.settings import load_settings


@pytest.fixture
def project(tmp_path, tiny_data, tiny_environ, monkeypatch):
    """A folder with data/ and runs/r, as a run that was started there with relative paths leaves it."""
    root = tmp_path / "project"
    shutil.copytree(tiny_data[0], root / "data")
    monkeypatch.chdir(root)
    paths = {"DATA_PATH": "data", "TOKENIZER_PATH": f"data/{tiny_data[1].name}", "OUT_DIR": "runs", "RUN_ID": "r"}
    settings = load_settings({**tiny_environ, **paths, "NUM_LAYERS": "2", "PARALLEL_START_LAYER": "0"})
    folder = root / "runs" / "r"
    folder.mkdir(parents=True)
    write_settings(folder / "settings.json", settings)
    weights = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(1)).state_dict()
    metadata = {
        "model": ModelConfig.of(settings).as_dict(),
        "scoring": settings.scoring,
        "tokenizer_sha256": Tokenizer(settings.tokenizer_path).sha256,
    }
    stored = [StoredTensor(name, role_of(name), tuple(x.shape), x, None, 32) for name, x in weights.items()]
    write_artifact(folder / "model.pgolf", stored, metadata, mode="static")
    return root


def score(capsys, *words) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words) -> str:
    assert main(["eval", *map(str, words)]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    return output.err


def test_a_run_is_scored_from_any_folder_and_wherever_it_is_moved(project, tmp_path, capsys, monkeypatch):
    here = score(capsys, "runs/r")
    assert here["data_path"] == "data"
    monkeypatch.chdir(project / "runs" / "r")
    assert score(capsys, ".")["val_bpb"] == here["val_bpb"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # another one, which is not meant
    assert score(capsys, "project/runs/r")["val_bpb"] == here["val_bpb"]
    shutil.copytree(project / "runs" / "r", tmp_path / "alone")
    assert score(capsys, "alone")["data_path"] == str(project / "data")
    project.rename(tmp_path / "moved")
    assert score(capsys, "moved/runs/r")["data_path"] == str(tmp_path / "moved" / "data")
    assert f"{project}/data" in refusal(capsys, "alone")


def test_a_run_of_before_is_found_by_where_it_lies(project, tmp_path, monkeypatch):
    path = project / "runs" / "r" / "settings.json"
    values = json.loads(path.read_text())
    assert values.pop(STARTED_IN) == ["../..", str(project)]
    path.write_text(json.dumps(values))
    assert read_settings(path).data_path == "data"
    monkeypatch.chdir(tmp_path)
    assert read_settings(path).data_path == str(project / "data")


def test_a_run_is_resumed_from_any_folder(project, tmp_path, monkeypatch):
    (project / "runs" / "r" / "checkpoint.pt").touch()
    monkeypatch.setenv("RESUME", "project/runs/r")
    monkeypatch.chdir(tmp_path)
    settings = settings_of_run(cuda=False)
    assert (settings.data_path, settings.out_dir) == (str(project / "data"), "project/runs")
    monkeypatch.chdir(project)
    monkeypatch.setenv("RESUME", "runs/r")
    monkeypatch.setenv("DATA_PATH", "data")
    assert settings_of_run(cuda=False).data_path == "data"
    (project / "runs" / "r" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"RESUME=runs/r: no settings\.json there"):
        settings_of_run(cuda=False)
    monkeypatch.setenv("RESUME", "x" * 900)  # no name that a file system takes
    with pytest.raises(UserError, match=r"RESUME=x+: no checkpoint\.pt there"):
        settings_of_run(cuda=False)


@pytest.mark.parametrize(
    "text", ["[]", "null", "7", "", "[" * 100_000, '{"seed": ' + "[" * 100_000, '{"seed": NaN}', '{"\\ud800": 1}']
)
def test_settings_that_are_none_are_one_line(project, text, capsys):
    path = project / "runs" / "r" / "settings.json"
    path.write_text(text)
    assert "not the settings of a run" in refusal(capsys, "runs/r")


@pytest.mark.parametrize("started_in", ["x", [], [1], {}, 0])
def test_a_wrong_starting_folder_is_one_line(project, started_in, capsys):
    path = project / "runs" / "r" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), STARTED_IN: started_in}))
    assert "started_in: must be a list of folders" in refusal(capsys, "runs/r")


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "a\0b"])
def test_names_that_no_file_can_have_are_one_line(project, name, capsys):
    path = project / "runs" / "r" / "settings.json"
    for field in ("data_path", "tokenizer_path"):
        good = json.loads(path.read_text())
        path.write_text(json.dumps({**good, field: name}))
        refusal(capsys, "runs/r")
        path.write_text(json.dumps(good))


def test_shards_of_another_tokenizer_are_refused(project, made_up_text, capsys):
    (project / "other.txt").write_text("\n\n".join(made_up_text(60, seed=1)))
    other = tokenize_files([project / "other.txt"], project / "other", vocab_size=320).data_path
    assert "made with another tokenizer than data/" in refusal(capsys, "runs/r", "--data-path", other)
    assert score(capsys, "runs/r", "--data-path", "data")["data_made_with_this_tokenizer"] is True
    (other / "prepared.json").unlink()
    assert score(capsys, "runs/r", "--data-path", other)["data_made_with_this_tokenizer"] is None
    assert main(["eval", "runs/r", "--data-path", str(other)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert "no prepared.json names the tokenizer" in told[1]
    assert main(["eval", "runs/r"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_split_of_no_bytes_is_refused(project, capsys):
    (shard,) = find_shards("data", "val")
    sidecar = shard.with_name(shard.name.replace("_val_", "_val_bytes_"))
    write_shard(sidecar, np.zeros(len(read_shard(shard)), dtype=np.uint16))
    assert f"0 bytes of text (by its byte sidecar {sidecar.name})" in refusal(capsys, "runs/r")
    sidecar.unlink()
    write_shard(shard, np.ones(20, dtype=np.uint16))
    assert "0 bytes of text (every token is a control piece)" in refusal(capsys, "runs/r")
    shard.write_bytes(b"")
    assert "header ends at byte 0" in refusal(capsys, "runs/r")


def test_pipes_and_devices_are_not_waited_for(project, capsys):
    os.mkfifo("pipe")
    os.mkfifo("data/x_val_000001.bin")  # passed over: not a shard
    for path in ("pipe", "/dev/zero"):
        assert "not an ordinary file" in refusal(capsys, "runs/r", "--tokenizer-path", path)
        shutil.rmtree("bad", ignore_errors=True)
        os.mkdir("bad")
        os.symlink(os.path.abspath(path), "bad/x_val_000000.bin")
        assert "no *_val_*.bin shards" in refusal(capsys, "runs/r", "--data-path", "bad")
    score(capsys, "runs/r")


def test_a_context_that_no_machine_has_is_refused(project, capsys):
    for length in (0, -1, 131_073, 10**12):
        assert "must be a whole number from 1 to 131072" in refusal(capsys, "runs/r", "--seq-len", length)
    assert score(capsys, "runs/r", "--seq-len", 131_072, "--ngram", "adaptive")["val_bpb"] > 0


def test_verify_refuses_what_eval_refuses(project, capsys):
    path = project / "runs" / "r" / "model.pgolf"
    good = read_artifact(path)
    assert main(["artifact", "verify", str(path)]) == 0
    capsys.readouterr()
    scoring = good.metadata["scoring"]
    for wrong in (
        *({"scoring": each} for each in (None, 7, [], {}, {**scoring, "seq_len": 2**31}, {**scoring, "stride": -1})),
        *({"scoring": {**scoring, "bos_id": each}} for each in (-1, 2**31, "x")),
        *({"tokenizer_sha256": each} for each in (None, 7, "", "x" * 64)),
    ):
        write_artifact(path, good.tensors.values(), {**good.metadata, **wrong})
        refusal(capsys, "runs/r")
        assert main(["artifact", "verify", str(path)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("pgolf: artifact: its metadata ")
        assert line.count("\n") == 1
