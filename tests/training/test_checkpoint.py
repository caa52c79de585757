"""The checkpoint's format: what comes back, the last two files, and everything that must be refused with one line."""

import io
import math
import os
import re
import zipfile

import pytest
import torch

from pgolf.runtime.files import WriteError
from pgolf.training import checkpoint
from pgolf.training.checkpoint import CHECKPOINT, PREVIOUS, CheckpointError, NotFinite


def state_of(step: int = 3, **changes) -> dict:
    return {
        "model": {"embedding": torch.full((4, 3), float(step)), "gain": torch.ones(2)},
        "optimisers": [{"state": {0: {"momentum_buffer": torch.zeros(4, 3)}}, "param_groups": []}],
        "average": {"average": [torch.full((4, 3), 0.5), torch.zeros(2)], "updates": 2},
        "loader": {"epoch": 0, "position": 12},
        "step": step,
        "flops": 10**15,
        "used_seconds": 1.5,
        **changes,
    }


def test_the_last_two_are_kept_and_read_back(tmp_path):
    for step in (3, 4, 5):
        size = checkpoint.save(tmp_path / CHECKPOINT, state_of(step))
    assert size == (tmp_path / CHECKPOINT).stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, CHECKPOINT]
    newest, before = (checkpoint.load(path) for path in checkpoint.candidates(tmp_path))
    assert (newest["step"], before["step"]) == (5, 4)
    assert torch.equal(newest["model"]["embedding"], torch.full((4, 3), 5.0))
    checkpoint.save(tmp_path / CHECKPOINT, state_of(6), keep_old=False)
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == 4


def test_weights_are_the_average_where_there_is_one(tmp_path):
    path = tmp_path / CHECKPOINT
    for average, expected in (
        ({"average": [torch.full((4, 3), 0.5), torch.zeros(2)], "updates": 2}, 0.5),
        ({"average": [torch.full((4, 3), 0.5), torch.zeros(2)], "updates": 0}, 3.0),
        (None, 3.0),
    ):
        checkpoint.save(path, state_of(average=average))
        for where in (path, tmp_path):
            (name, embedding), (gain, _) = checkpoint.weights(where)
            assert (name, gain) == ("embedding", "gain")
            assert torch.equal(embedding, torch.full((4, 3), expected))


def test_weights_of_a_damaged_checkpoint_are_those_before(tmp_path):
    checkpoint.save(tmp_path / CHECKPOINT, state_of(3, average=None))
    checkpoint.save(tmp_path / CHECKPOINT, state_of(4, average=None))
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:900])
    assert float(checkpoint.weights(tmp_path)[0][1][0, 0]) == 3.0
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*damaged"):
        checkpoint.weights(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.weights(tmp_path / "nowhere")


def test_a_diverged_state_is_not_kept(tmp_path):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, state_of(3))
    for bad in (math.nan, math.inf):
        with pytest.raises(NotFinite, match="step 9"):
            checkpoint.save(path, state_of(9, model={"embedding": torch.tensor([1.0, bad])}))
    assert checkpoint.load(path)["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("room", [0, 100, 700, 1500])
def test_a_full_disk_leaves_what_was_there(room, tmp_path):
    """A real one, where torch puts an error of its own over the disk's."""
    resource = pytest.importorskip("resource")
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, state_of(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(WriteError) as error:
            checkpoint.save(path, state_of(4, model={"embedding": torch.zeros(40, 30)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{path}: cannot be written (File too large)"
    assert checkpoint.load(path)["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == [CHECKPOINT]


TAMPERED = {
    "step of another type": {"step": "3"},
    "step true": {"step": True},
    "negative step": {"step": -1},
    "absurd step": {"step": 10**18},
    "seconds not a number": {"used_seconds": math.nan},
    "negative seconds": {"used_seconds": -1.0},
    "whole seconds": {"used_seconds": 3},
    "absurd seconds": {"used_seconds": 1e300},
    "negative flops": {"flops": -5},
    "infinite flops": {"flops": math.inf},
    "a list for a model": {"model": [torch.zeros(3)]},
    "weights not finite": {"model": {"embedding": torch.full((4, 3), math.nan), "gain": torch.ones(2)}},
    "weights of whole numbers": {"model": {"embedding": torch.zeros(4, 3, dtype=torch.int64), "gain": torch.ones(2)}},
    "weights that repeat one number": {"model": {"embedding": torch.zeros(1).expand(10**12), "gain": torch.ones(2)}},
    "a sparse tensor": {"model": {"embedding": torch.eye(3).to_sparse(), "gain": torch.ones(2)}},
    "an average of another shape": {"average": {"average": [torch.zeros(3, 4), torch.zeros(2)], "updates": 1}},
    "an average too short": {"average": {"average": [torch.zeros(4, 3)], "updates": 1}},
    "more averages than steps": {"average": {"average": [torch.zeros(4, 3), torch.zeros(2)], "updates": 50}},
    "no loader": {"loader": None},
    "no optimisers": {"optimisers": 5},
    "a field too many": {"more": 1},
    "code": {"loader": print},
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_checkpoint_is_one_line(case, tmp_path):
    path = tmp_path / CHECKPOINT
    torch.save(state_of(**TAMPERED[case]), path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert not re.search(r"weights_only|torch\.load|trusted|pickle", line), "torch's advice is not ours"


def rebuilt(content: bytes, compression: int = zipfile.ZIP_STORED, zeros: int = 0) -> bytes:
    """A checkpoint packed anew, with so many more bytes of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        if zeros:
            new.writestr("archive/data/99", bytes(zeros))
    return out.getvalue()


def test_a_container_that_expands_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, state_of())
    content = path.read_bytes()
    path.write_bytes(rebuilt(content))
    assert checkpoint.load(path)["step"] == 3
    monkeypatch.setattr(torch, "load", lambda *args, **kw: pytest.fail("was read"))
    path.write_bytes(rebuilt(content, zipfile.ZIP_DEFLATED, zeros=1 << 26))
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.load(path)
    # Entries that all stand at one place: each as large as the file.
    stored = bytearray(rebuilt(content, zeros=1 << 16))
    directory = stored.rfind(b"PK\x01\x02")
    stored[directory + 20 : directory + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(stored)
    with pytest.raises(CheckpointError, match="declares more bytes"):
        checkpoint.load(path)


@pytest.mark.parametrize("cut", [0, 1, 100, 1000, -30])
def test_a_damaged_file_is_one_line(cut, tmp_path):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, state_of())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"it is empty|damaged or cut short|more bytes than") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_pipe_in_its_place_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a checkpoint of a run"):
        checkpoint.load(tmp_path / "checkpoint.pt")
