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
from collections import deque
from pathlib import Path

import brotli
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf import ops, streams
from pgolf.artifact import ROLES, StoredTensor, read_artifact, write_artifact
from pgolf.errors import ArtifactError


def stored(name, shape, bits, seed=0, role="mlp", spread=0.25, states=0):
    """A tensor of random values; `spread` is their standard deviation as a share of the range."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread
    if bits >= 16:
        return StoredTensor(name, role, tuple(shape), values.to(streams.dtype_of(bits)), None, bits)
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
    """Another program's reader, written from the docstring of pgolf.artifact and nothing of pgolf's code."""
    assert data[:8] == bytes.fromhex("8950474f4c460d0a")
    version, stored_size, size, crc = struct.unpack_from("<IIII", data, 8)
    text = data[24 : 24 + stored_size]
    assert version == 2
    assert zlib.crc32(data[:20] + text) == crc
    text = brotli.decompress(text)
    assert len(text) == size
    manifest = json.loads(text)
    at = 24 + stored_size

    def follow(coded, order, states, shape):
        """The values of a trellis in row-major order, from `coded`, taken at both ends."""
        machine = {
            4: [(0, 2), (2, 0), (1, 3), (3, 1)],
            8: [(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)],
        }[states]
        coded, values, (rows, columns) = deque(coded), [0] * math.prod(shape), shape[-2:]
        for row in range(math.prod(shape[:-1])):
            classes, state = order[row // rows * columns :][:columns], 0
            for column in sorted(range(columns), key=lambda j: classes[j]):
                second = state % 2 if states == 8 else state // 2
                value = coded.pop() if second else coded.popleft()
                values[row * columns + column] = value
                state = machine[state][value % 2]
        return values

    def stream(codec, layout, bits, count):
        nonlocal at, crc
        length, expected = struct.unpack_from("<II", data, at)
        blob = data[at + 8 : at + 8 + length]
        crc = zlib.crc32(data[at : at + 4] + blob, crc)
        assert crc == expected
        at += 8 + length
        if codec == "brotli":
            blob = brotli.decompress(blob)
        elif codec == "zstd":
            blob = zstandard.ZstdDecompressor().decompress(blob)
        if layout == "packed":
            whole = int.from_bytes(blob, "little")
            low = [(whole >> (i * bits)) & (2**bits - 1) for i in range(count)]
            return [value - (value >> (bits - 1) << bits) for value in low]
        if layout == "planes":
            planes = [blob[i * count : (i + 1) * count] for i in range(bits // 8)]
            blob = bytes(octet for value in zip(*planes, strict=True) for octet in value)
        return list(struct.unpack(f"<{count}{ {16: 'e', 32: 'f'}.get(bits, 'b') }", blob))

    found = {}
    for tensor in manifest["tensors"]:
        shape, bits = tensor["shape"], tensor["bits"]
        values = stream(*tensor["values"], bits, math.prod(shape))
        scale = stream(*tensor["scale"], 16, math.prod(shape[:-1])) if bits <= 8 else None
        if bits <= 8 and tensor["states"]:
            order = stream(*tensor["order"], 2, math.prod([*shape[:-2], shape[-1]]))
            values = follow(values, order, tensor["states"], shape)
        found[tensor["name"]] = (tensor["role"], shape, bits, values, scale)
    assert at == len(data)
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


def assert_read_by_all(path, tensors, metadata, count):
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


@st.composite
def stored_tensors(draw):
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32]))
    shape = draw(st.lists(st.integers(0, 9), min_size=1 if bits <= 8 else 0, max_size=3))
    name = draw(st.text("abz09_./-", min_size=1, max_size=12))
    seed, spread = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.1, 0.4, 5.0]))
    states = draw(st.sampled_from([0, 4, 8])) if bits <= 8 and len(shape) > 1 else 0
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
)
@settings(max_examples=120, deadline=None)
def test_round_trip_and_independent_reader(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "round_trip.pgolf"
    assert_read_by_all(path, tensors, metadata, write_artifact(path, tensors, metadata))


def test_a_model(tmp_path):
    path = tmp_path / "model.pgolf"
    count = write_artifact(path, model(), {"model": {"dim": 16}})
    assert_read_by_all(path, model(), {"model": {"dim": 16}}, count)
    assert count.streams["none:values"] == 0
    assert set(count.roles) == set(ROLES)


@pytest.mark.parametrize("bits", [3, 6, 16])
def test_large_streams_are_chosen_by_a_sample(tmp_path, bits):
    tensor = stored("large", (3, 211, 311), bits)
    assert tensor.values.numel() > streams.SAMPLE_VALUES
    path = tmp_path / "large.pgolf"
    assert_read_by_all(path, [tensor], {}, write_artifact(path, [tensor], {}))


@pytest.mark.parametrize(
    ("bits", "spread"), [(2, 5.0), (3, 5.0), (5, 0.3), (6, 0.1), (7, 5.0), (8, 0.1), (16, 0.2), (32, 0.2)]
)
def test_the_smallest_encoding_is_kept(bits, spread):
    values = stored("any", (40, 60), bits, spread=spread).values.reshape(-1)
    tried = {
        (codec, layout): len(streams._encode_as(values, bits, codec, layout).data)
        for codec in streams.CODECS
        for layout in streams.layouts_of(bits)
    }
    kept = streams.encode(values, bits)
    assert len(kept.data) == min(tried.values()) == tried[kept.codec, kept.layout]


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("place", [0, -1])
def test_every_codec_and_layout_is_read_by_all(tmp_path, monkeypatch, codec, place):
    """Also the pairs that `encode` would not choose for these values."""

    def encode(values, bits, codecs):
        return streams._encode_as(values, bits, codec, streams.layouts_of(bits)[place])

    monkeypatch.setattr(streams, "encode", encode)
    path = tmp_path / "forced.pgolf"
    tensors = [stored(f"w{bits}", (7, 31), bits) for bits in (2, 5, 7, 8, 16, 32)]
    assert_read_by_all(path, tensors, {}, write_artifact(path, tensors, {}))


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


def test_equal_input_makes_equal_bytes(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write_artifact(one, model(), {"a": 1, "b": [0.1, None]}, threads=1)
    strided = model()
    strided[1].values = strided[1].values.mT.contiguous().mT
    write_artifact(other, strided, {"b": (0.1, None), "a": 1}, threads=5)
    assert one.read_bytes() == other.read_bytes()


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
import os, sys, torch
from pgolf.artifact import StoredTensor, write_artifact
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
models = [
    [StoredTensor("w", "mlp", (60, 100), torch.randint(-32, 32, (60, 100), generator=generator).to(torch.int8),
                  torch.full((60,), float(which)).half(), 6)]
    for which in range(2)
]
for line in sys.stdin:  # one line, one writer that never stops by itself
    child = os.fork()
    if not child:
        for turn in range(1_000_000):
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
        [sys.executable, "-c", WRITER], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        for _ in range(30):
            starter.stdin.write(f"{path}\n")
            starter.stdin.flush()
            writer = int(starter.stdout.readline())
            time.sleep(0.02 + chance.random() * 0.06)
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
    with pytest.raises(OSError, match="No space"):
        write_artifact(path, model(), {"which": "new"})
    monkeypatch.undo()
    assert read_artifact(path).metadata == {"which": "old"}
    assert list(tmp_path.iterdir()) == [path]
