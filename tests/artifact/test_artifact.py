"""The artifact: what goes in comes out, another program can read it, and a killed writer leaves a whole file."""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf import ops
from pgolf.artifact import coder, streams
from pgolf.artifact.file import ROLES, StoredTensor, read_artifact, write_artifact
from pgolf.artifact.stored_tensor import dtype_of
from pgolf.errors import ArtifactError
from pgolf.runtime.files import WriteError

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
KINDS = ("gptq", "scale")
BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "up_bank": ("mlp.fc",),
    "down_bank": ("mlp.proj",),
}


def stored(name, shape, bits, seed=0, role="mlp", spread=0.25, states=0):
    """A tensor of random values; `spread` is their standard deviation as a share of the range."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread
    if bits >= 16:
        return StoredTensor(name, role, tuple(shape), values.to(dtype_of(bits)), None, bits)
    bound = 2 ** (bits - 1)
    values = (values * bound).round().clamp(-bound, bound - 1).to(torch.int8)
    scale = torch.rand(shape[:-1], generator=generator).half()
    order = None
    if states:
        order = torch.randint(0, 4, (*shape[:-2], shape[-1]), generator=generator).to(torch.int8)
    return StoredTensor(name, role, tuple(shape), values, scale, bits, order, states)


def model():
    return [
        stored("embedding", (64, 16), 8, role="embedding"),
        stored("qkv", (2, 24, 16), 6, role="attention"),
        stored("up", (2, 32, 16), 5),
        stored("down", (2, 16, 32), 6, states=8),
        stored("head", (9, 16), 8, states=4, role="embedding"),
        stored("gain", (2, 4), 16, role="control"),
        stored("mix", (), 32, role="control"),
        stored("none", (0, 4), 4, role="control"),
    ]


def read_by_description(data):
    """Another program's reader: the coder, and for all else the docstrings of file.py and manifest.py."""
    assert data[:8] == bytes.fromhex("8950474f4c460d0a")
    version, stored_size, size, crc = struct.unpack_from("<IIII", data, 8)
    text = data[24 : 24 + stored_size]
    assert version == 3
    assert zlib.crc32(data[:20] + text) == crc
    text = brotli.decompress(text)
    assert len(text) == size
    manifest = json.loads(text)
    at = 24 + stored_size

    def stream(decode):
        nonlocal at, crc
        length, expected = struct.unpack_from("<II", data, at)
        blob = data[at + 8 : at + 8 + length]
        crc = zlib.crc32(data[at : at + 4] + blob, crc)
        assert crc == expected
        at += 8 + length
        return decode(blob)

    quantized = [tensor for tensor in manifest["tensors"] if tensor["bits"] <= 8]
    values = {tensor["name"]: stream(coder.decode) for tensor in quantized}
    scales, orders = {}, {}
    for role in ("embedding", "attention", "mlp", "control"):
        own = [tensor for tensor in manifest["tensors"] if tensor["role"] == role]
        scaled = [tensor for tensor in own if tensor["bits"] <= 8]
        trellises = [tensor for tensor in scaled if tensor["states"]]
        floats = [tensor for tensor in own if tensor["bits"] > 8]
        if scaled:
            for tensor, array in zip(scaled, stream(coder.decode_floats), strict=True):
                scales[tensor["name"]] = array
        if trellises:
            stacks = {array.shape[-1]: array.tolist() for array in stream(coder.decode)}
            for tensor in trellises:
                matrices = tensor["shape"][0] if len(tensor["shape"]) == 3 else 1
                orders[tensor["name"]] = [stacks[tensor["shape"][-1]].pop(0) for _ in range(matrices)]
        if floats:
            for tensor, array in zip(floats, stream(coder.decode_floats), strict=True):
                values[tensor["name"]] = array
    assert at == len(data)

    found = {}
    for tensor in manifest["tensors"]:
        name, shape = tensor["name"], tensor["shape"]
        array = values[name].reshape(-1).tolist()
        if name in orders and array:
            rows, columns = shape[-2:]
            taken, array = array, [None] * len(array)
            for row in range(len(array) // columns):
                order = orders[name][row // rows]
                for place, column in enumerate(sorted(range(columns), key=lambda j: order[j])):
                    array[row * columns + column] = taken[row * columns + place]
        scale = scales[name].reshape(-1).tolist() if name in scales else None
        found[name] = (tensor["role"], shape, tensor["bits"], array, scale)
    return manifest["metadata"], found


def assert_same(one, other):
    assert (one.name, one.role, one.shape, one.bits) == (other.name, other.role, other.shape, other.bits)
    assert one.states == other.states
    assert (one.order is None) == (other.order is None)
    if one.order is not None:
        assert torch.equal(one.order, other.order)
    assert one.values.dtype == other.values.dtype
    assert torch.equal(one.values, other.values)
    assert (one.scale is None) == (other.scale is None)
    if one.scale is not None:
        assert one.scale.dtype == other.scale.dtype
        assert torch.equal(one.scale, other.scale)


def assert_read_by_all(path, tensors, metadata, mode="mix"):
    count = write_artifact(path, tensors, metadata, mode=mode)
    assert count.total == path.stat().st_size
    assert sum(count.roles.values()) + count.container == count.total
    artifact = read_artifact(path)
    assert artifact.bytes == count
    assert artifact.metadata == metadata
    assert list(artifact.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        assert_same(artifact.tensors[tensor.name], tensor)
    other_metadata, others = read_by_description(path.read_bytes())
    assert other_metadata == metadata
    for tensor in tensors:
        role, shape, bits, values, scale = others[tensor.name]
        assert (role, tuple(shape), bits) == (tensor.role, tensor.shape, tensor.bits)
        assert values == tensor.values.reshape(-1).tolist()
        assert scale == (None if tensor.scale is None else tensor.scale.reshape(-1).tolist())
    return count


@st.composite
def stored_tensors(draw):
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32]))
    shape = draw(st.lists(st.integers(0, 9), min_size=1 if bits <= 8 else 0, max_size=5))
    name = draw(st.text("abz09_./-", min_size=1, max_size=12))
    seed, spread = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.1, 0.4, 5.0]))
    states = draw(st.sampled_from([0, 4, 8])) if bits <= 8 and len(shape) in (2, 3) else 0
    return stored(name, shape, bits, seed, draw(st.sampled_from(ROLES)), spread, states)


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    st.lists(stored_tensors(), max_size=4, unique_by=lambda each: each.name),
    st.dictionaries(st.text(max_size=5), plain_json, max_size=3),
    st.sampled_from(coder.MODES),
)
@settings(max_examples=120, deadline=None)
def test_round_trip_and_independent_reader(tmp_path_factory, tensors, metadata, mode):
    path = tmp_path_factory.getbasetemp() / "round_trip.pgolf"
    assert_read_by_all(path, tensors, metadata, mode)


@pytest.mark.parametrize("mode", coder.MODES)
def test_a_model(tmp_path, mode):
    path = tmp_path / "model.pgolf"
    count = assert_read_by_all(path, model(), {"model": {"dim": 16}}, mode)
    assert set(count.roles) == set(ROLES)
    assert set(count.streams) == {
        *("embedding:values", "qkv:values", "up:values", "down:values", "head:values", "none:values"),
        *("embedding:scales", "embedding:orders", "attention:scales", "mlp:scales", "mlp:orders"),
        *("control:scales", "control:floats"),
    }


def test_matrices_are_permuted_some_at_a_time(monkeypatch):
    tensor = stored("bank", (5, 7, 30), 6, states=8)
    expected = streams.in_order(tensor.values, tensor.order)
    monkeypatch.setattr(streams, "PERMUTED_VALUES", 61)
    assert torch.equal(streams.in_order(tensor.values, tensor.order), expected)
    assert torch.equal(streams.out_of_order(expected, tensor.order), tensor.values)


def test_dequantize_is_value_times_scale():
    for tensor in (stored("a", (2, 5, 9), 6), stored("b", (5, 8), 8), stored("c", (11,), 4), stored("d", (0, 3), 5)):
        exact = tensor.values.double() * tensor.scale.double().unsqueeze(-1)
        torch.testing.assert_close(tensor.dequantize(torch.float32).double(), exact, rtol=1e-6, atol=0)
        assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16
        assert tensor.dequantize().shape == tensor.shape
    trellis = stored("f", (2, 5, 9), 6, states=8)
    assert torch.equal(
        trellis.dequantize(), ops.trellis_dequantize(trellis.values, trellis.scale, trellis.order, trellis.states)
    )
    assert trellis.dequantize(torch.float16).dtype == torch.float16
    half = stored("e", (3, 2), 16)
    assert torch.equal(half.dequantize(torch.float32), half.values.float())


@pytest.mark.parametrize("mode", coder.MODES)
def test_equal_input_makes_equal_bytes(tmp_path, mode):
    one, other = tmp_path / "one", tmp_path / "other"
    write_artifact(one, model(), {"a": 1, "b": [0.1, None]}, threads=1, mode=mode)
    strided = model()
    strided[1].values = strided[1].values.mT.contiguous().mT
    write_artifact(other, strided, {"b": (0.1, None), "a": 1}, threads=5, mode=mode)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs shared/data/weights beside the repository")
def test_bytes_of_real_weights(tmp_path):
    """Trained int6 matrices in the model's four banks, below their order-0 entropy with all that is around them."""
    tensors, entropy = [], 0.0
    for name, roles in BANKS.items():
        parts = [[np.load(WEIGHTS / f"{kind}_blocks.{i}.{r}.npy") for r in roles for i in range(6)] for kind in KINDS]
        values, scale = (torch.from_numpy(np.stack(part)) for part in parts)
        tensors.append(
            StoredTensor(name, "mlp", tuple(values.shape), values, scale.half().reshape(values.shape[:2]), 6)
        )
        for matrix in values:
            share = matrix.unique(return_counts=True)[1].double() / matrix.numel()
            entropy -= float((share * share.log2()).sum()) * matrix.numel() / 8
    count = write_artifact(tmp_path / "model.pgolf", tensors, {})
    coded = sum(count.streams[f"{name}:values"] for name in BANKS)
    assert coded <= 0.9970 * entropy
    scales = sum(tensor.scale.nbytes for tensor in tensors)
    assert count.streams["mlp:scales"] < 0.6 * scales
    assert count.container < 250
    static = write_artifact(tmp_path / "static.pgolf", tensors, {}, mode="static")
    assert sum(static.streams[f"{name}:values"] for name in BANKS) <= 1.001 * entropy


def spoilt(**changes):
    tensor = stored("w", (3, 4), 6)
    for name, value in changes.items():
        setattr(tensor, name, value)
    return [tensor]


def with_scale(value):
    scale = torch.ones(3).half()
    scale[1] = value
    return spoilt(scale=scale)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (spoilt(values=torch.full((3, 4), 32, dtype=torch.int8)), "32"),
        (spoilt(values=torch.full((3, 4), -33, dtype=torch.int8)), "-33"),
        (spoilt(values=torch.zeros(3, 4)), "torch.float32"),
        (spoilt(values=None), "NoneType"),
        (spoilt(shape=(4, 3)), "shape"),
        (spoilt(shape=(3, True)), "shape"),
        (spoilt(scale=torch.ones(3)), "torch.float16"),
        (spoilt(scale=torch.ones(4).half()), "scale"),
        (spoilt(scale=None), "scale"),
        (with_scale(math.nan), "finite"),
        (with_scale(math.inf), "finite"),
        (spoilt(bits=1), "bits"),
        (spoilt(bits=9), "bits"),
        (spoilt(bits=6.0), "bits"),
        (spoilt(bits=16, scale=None), "torch.float16"),
        (spoilt(states=8), "order"),
        (spoilt(states=5), "states"),
        (spoilt(order=torch.zeros(4, dtype=torch.int8)), "order"),
        (spoilt(states=8, order=torch.zeros(3, dtype=torch.int8)), "order"),
        (spoilt(states=8, order=torch.full((4,), 4, dtype=torch.int8)), "order"),
        (spoilt(role="head"), "role"),
        (spoilt(name="two words"), "name"),
        (spoilt(name=""), "name"),
        (spoilt(name="x" * 129), "name"),
        (spoilt(name=7), "name"),
        (spoilt(bits=32, values=torch.full((3, 4), -math.inf), scale=None), "finite"),
        (spoilt(bits=32, values=torch.full((3, 4), math.nan), scale=None), "finite"),
        (spoilt(bits=32, values=torch.zeros(3, 4)), "scale"),
        (spoilt() + spoilt(), "twice"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_artifact(tmp_path / "bad.pgolf", tensors, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metadata",
    [None, [], {1: 2}, {"a": math.nan}, {"a": [math.inf]}, {"a": 2**63}, {"a": {1, 2}}, {"a": b"x"}, {"a": "\ud800"},
     {"a": [[[[[[[[[]]]]]]]]]}, {"a": "x" * 2**20}],
)  # fmt: skip
def test_metadata_that_is_not_small_json_is_refused(tmp_path, metadata):
    with pytest.raises(ValueError):
        write_artifact(tmp_path / "bad.pgolf", [], metadata)
    assert not list(tmp_path.iterdir())


def test_the_limit_holds_for_writer_and_reader(tmp_path):
    path = tmp_path / "model.pgolf"
    tensors = [stored("a", (100, 100), 8), stored("b", (100, 50), 32)]
    needed = 100 * 100 + 200 + 100 * 50 * 4 * 2  # everything once, and the largest again
    with pytest.raises(ValueError, match=str(needed)):
        write_artifact(path, tensors, {}, limit_bytes=needed - 1)
    write_artifact(path, tensors, {}, limit_bytes=needed)
    read_artifact(path, limit_bytes=needed)
    with pytest.raises(ArtifactError, match=str(needed)):
        read_artifact(path, limit_bytes=needed - 1)


WRITER = """
import os, sys, time, torch
from pgolf.artifact import StoredTensor, write_artifact
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
models = [
    [StoredTensor("w", "mlp", (60, 100), torch.randint(-32, 32, (60, 100), generator=generator).to(torch.int8),
                  torch.full((60,), float(which)).half(), 6)]
    for which in range(2)
]
seconds = []
for _ in range(4):
    begin = time.perf_counter()
    write_artifact(sys.argv[1], models[0], {"which": 0}, threads=1)
    seconds.append(time.perf_counter() - begin)
print(min(seconds), flush=True)
for count, line in enumerate(sys.stdin):  # one line, one writer that never stops by itself
    child = os.fork()
    if not child:
        for turn in range(count, 1_000_000):  # a busy machine may let each write one file only
            write_artifact(line.strip(), models[turn % 2], {"which": turn % 2}, threads=1)
        os._exit(1)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "model.pgolf"
    chance = random.Random(0)
    seen = set()
    root = Path(pgolf.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "first")],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        seconds = max(0.02, float(starter.stdout.readline()))  # of a write; more where others work
        for _ in range(30):
            starter.stdin.write(f"{path}\n")
            starter.stdin.flush()
            writer = int(starter.stdout.readline())
            time.sleep(seconds * (1 + 3 * chance.random()))
            os.kill(writer, signal.SIGKILL)
            assert starter.stdout.readline() == "gone\n"
            if path.exists():
                artifact = read_artifact(path)
                which = artifact.metadata["which"]
                assert torch.equal(artifact.tensors["w"].scale, torch.full((60,), float(which)).half())
                seen.add(which)
        starter.stdin.close()
    assert seen == {0, 1}


def test_a_writer_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pgolf"
    write_artifact(path, model(), {"which": "old"})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="No space"):
        write_artifact(path, model(), {"which": "new"})
    monkeypatch.undo()
    assert read_artifact(path).metadata == {"which": "old"}
    assert list(tmp_path.iterdir()) == [path]
