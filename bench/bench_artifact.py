"""Writing and reading the artifact of a model of the demo's size, beside a pickle through zlib.

The weights are random: normal values clipped at 12.85 standard deviations and rounded to 6 bits (8 for the embedding),
which is what GPTQ leaves to be stored.
"""

import io
import zlib
from pathlib import Path

import pytest
import torch

from bench.harness.measure import Work

pytest.importorskip("pydantic", reason="settings need pydantic")
pytest.importorskip("brotli", reason="the manifest needs brotli")

from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.model import ModelConfig, role_of
from pgolf.settings import load_settings


def random_tensors() -> list[StoredTensor]:
    shapes = ModelConfig.of(load_settings({"RUN_ID": "bench"}, preset="demo")).shapes()
    tensors = []
    for name, shape in shapes.items():
        role = role_of(name)
        if role == "control":
            tensors.append(StoredTensor(name, role, shape, torch.randn(shape).half(), None, 16))
            continue
        bits, sigmas = (8, 20.0) if role == "embedding" else (6, 12.85)
        limit = 2 ** (bits - 1) - 1
        values = (torch.randn(shape) * limit / sigmas).round().clamp(-limit, limit).to(torch.int8)
        tensors.append(StoredTensor(name, role, shape, values, torch.rand(shape[:-1]).half() + 0.01, bits))
    return tensors


def pickled(tensors: list[StoredTensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({tensor.name: (tensor.values, tensor.scale) for tensor in tensors}, buffer)
    return zlib.compress(buffer.getvalue(), level=9)


@pytest.fixture
def files(tmp_path) -> tuple[list[StoredTensor], Path, bytes, Work]:
    """The tensors, their artifact, their pickle, and the bytes that either way must at least be touched."""
    tensors = random_tensors()
    path = tmp_path / "model.pgolf"
    size = write_artifact(path, tensors, {}).total
    return tensors, path, pickled(tensors), Work(bytes=size + sum(tensor.values.nbytes for tensor in tensors))


def test_write_artifact(measure, files):
    tensors, path, pickle, work = files
    measure(
        "write_artifact",
        "demo",
        shape=f"{path.stat().st_size / 1e6:.2f} MB (pickle {len(pickle) / 1e6:.2f} MB)",
        dtype="int8",
        backend="native",
        make=tuple,
        call=lambda: write_artifact(path, tensors, {}),
        others={"pickle + zlib -9": lambda: path.with_suffix(".z").write_bytes(pickled(tensors))},
        tolerance=None,
        work=work,
    )


def test_read_artifact(measure, files):
    tensors, path, pickle, work = files
    packed = path.with_suffix(".z")
    packed.write_bytes(pickle)
    names = [tensor.name for tensor in tensors]

    def ours():
        found = read_artifact(path).tensors
        return [found[name].values for name in names]

    def theirs():
        found = torch.load(io.BytesIO(zlib.decompress(packed.read_bytes())), weights_only=True)
        return [found[name][0] for name in names]

    measure(
        "read_artifact",
        "demo",
        shape=f"{path.stat().st_size / 1e6:.2f} MB",
        dtype="int8",
        backend="native",
        make=tuple,
        call=ours,
        others={"pickle + zlib -9": theirs},
        work=work,
    )
