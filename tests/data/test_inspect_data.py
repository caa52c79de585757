import json
import shutil

import numpy as np
import pytest
import torch

from pgolf.data import inspect as module
from pgolf.data.inspect import inspect_folder
from pgolf.data.shards import read_shard, write_shard
from pgolf.errors import DataError


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Three training shards cut without regard to documents, and one for validation."""
    documents = [f" Document {i} begins with a space, and goes on.\n" for i in range(30)]
    tokens = [token for text in documents for token in [1, *tokenizer.encode(text)]]
    for index in range(3):
        write_shard(
            tmp_path / f"x_train_{index:06d}.bin", tokens[index * 200 : (index + 1) * 200 if index < 2 else None]
        )
    write_shard(tmp_path / "x_val_000000.bin", [1, *tokenizer.encode("Validation, é.")])
    return tmp_path


def test_the_demo_folder(demo):
    facts = inspect_folder(demo.data_path)
    prepared = json.loads((demo.data_path / "prepared.json").read_text())
    assert facts["problems"] == []
    assert facts["tokenizer"] == str(demo.tokenizer_path)
    assert facts["vocab_size"] == 1024
    assert facts["sidecar"] is None
    for split in ("train", "val"):
        row = facts["splits"][split]
        assert (row["tokens"], row["documents"]) == (prepared[split]["tokens"], prepared[split]["documents"])
        assert row["bytes_per_token"] == row["bytes"] / row["tokens"]
        assert row["max_token"] < 1024
    assert facts["splits"]["val"]["bytes"] == prepared["val"]["text_bytes"]
    # A space after a line end in a document is a document's own; only U+2581 in the text makes these differ.
    lost = prepared["train"]["text_bytes"] - facts["splits"]["train"]["bytes"]
    assert 0 <= lost < 100
    assert lost % 2 == 0


def test_bytes_over_shard_ends_and_chunk_ends(folder, demo, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 37)
    facts = inspect_folder(folder, demo.tokenizer_path)
    assert facts["problems"] == []
    row = facts["splits"]["train"]
    assert row["bytes"] == sum(len(f" Document {i} begins with a space, and goes on.\n") for i in range(30))
    assert (row["shards"], row["documents"]) == (3, 30)
    assert facts["splits"]["val"]["bytes"] == len("Validation, é.".encode())


def test_without_a_tokenizer(folder):
    facts = inspect_folder(folder)
    assert facts["tokenizer"] is None
    assert facts["splits"]["train"]["bytes"] is None
    assert facts["splits"]["train"]["documents"] == 30
    assert facts["problems"] == []


def test_a_sidecar_that_agrees(folder, tokenizer, demo):
    tokens = torch.from_numpy(read_shard(folder / "x_val_000000.bin").astype(np.int64))
    counts = tokenizer.byte_table().count(tokens[1:], tokens[:-1]).tolist()
    write_shard(folder / "x_val_bytes_000000.bin", [0, *counts])
    facts = inspect_folder(folder, demo.tokenizer_path)
    assert facts["problems"] == []
    assert facts["sidecar"] == {"shards": 1, "tokens": len(tokens), "bytes": len("Validation, é.".encode())}


def _break(action):
    return pytest.param(action[0], action[1], id=action[1][:30])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        _break(
            (lambda f: (f / "x_train_000001.bin").write_bytes(b"short"), "x_train_000001.bin: header ends at byte 5")
        ),
        _break((lambda f: (f / "x_train_000001.bin").unlink(), "train shard number 000001 is missing")),
        _break((lambda f: (f / "x_val_000000.bin").unlink(), "no val shards")),
        _break((lambda f: write_shard(f / "x_train_000003.bin", []), "x_train_000003.bin: no tokens")),
        _break((lambda f: write_shard(f / "x_train_000003.bin", [1, 7, 1024]), "token 1024 at index 2, the tokenizer")),
        _break((lambda f: write_shard(f / "x_val_000000.bin", [7, 1, 7]), "token 0 is 7, a split begins with")),
        _break((lambda f: write_shard(f / "x_val_000000.bin", [7, 7, 7]), "no val document begins with token 1")),
        _break(
            (lambda f: write_shard(f / "x_val_bytes_000000.bin", [0, 1]), "2 byte counts, but x_val_000000.bin has")
        ),
        _break((lambda f: write_shard(f / "x_val_bytes_000001.bin", [0, 1]), "x_val_000001.bin: No such file")),
        _break((lambda f: (f / "x_val_bytes_000000.bin").touch(), "x_val_bytes_000000.bin: header ends at byte 0")),
    ],
)
def test_each_thing_that_can_be_wrong(folder, demo, damage, problem):
    damage(folder)
    problems = inspect_folder(folder, demo.tokenizer_path)["problems"]
    assert any(problem in line for line in problems), problems
    assert all("\n" not in line for line in problems)


def test_bytes_where_a_document_begins(folder):
    count = len(read_shard(folder / "x_val_000000.bin"))
    write_shard(folder / "x_val_bytes_000000.bin", [3] * count)
    assert any("3 bytes at index 0" in line for line in inspect_folder(folder)["problems"])


def test_folders_that_cannot_be_inspected(tmp_path, folder):
    with pytest.raises(DataError, match="no data folder"):
        inspect_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .* shards"):
        inspect_folder(tmp_path / "empty")
    (tmp_path / "x.model").write_bytes(b"no")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        inspect_folder(folder, tmp_path / "x.model")


def test_a_broken_model_nearby_is_passed_over(demo, tmp_path):
    shutil.copytree(demo.data_path, tmp_path / "copy")
    (tmp_path / "copy" / "a.model").write_bytes(b"broken")
    shutil.copyfile(demo.tokenizer_path, tmp_path / "copy" / "b.model")
    assert inspect_folder(tmp_path / "copy")["tokenizer"] == str(tmp_path / "copy" / "b.model")
