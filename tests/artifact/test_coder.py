"""pgolf.artifact.coder: round trips, bytes against entropy and brotli, equal bytes from every build, damaged blobs."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from fuzz_seeds import sample_blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from native_drivers import build, needs_compiler

import pgolf
from pgolf.artifact import coder
from pgolf.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "data" / "weights"
ROLES = ("attn.c_k", "attn.c_q", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
MACHINES = {
    4: [(0, 2), (2, 0), (1, 3), (3, 1)],
    8: [(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)],
}
MEMORY_BYTES = 100_000_000
LIMIT_BYTES = 1 << 22

needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs shared/data/weights beside the repository")


def gaussian(deviation, *shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.clip(np.rint(values * deviation), -128, 127).astype(np.int8)


def near_copies():
    """An embedding whose later rows are near copies of earlier ones."""
    rows = gaussian(6, 64, 96)
    return np.concatenate([rows, rows[::-1] + gaussian(0.5, 64, 96, seed=1)])


def trellis_indices(states, rows, cols, seed=0):
    """Indices of a Gaussian, each the nearest of its quantiser: without the search, so only like real ones."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)) * 2.4
    indices, state = np.zeros((rows, cols), np.int8), np.zeros(rows, int)
    table = np.array(MACHINES[states])
    for c in range(cols):
        second = (state & 1 if states == 8 else state >> 1).astype(bool)
        first_index, magnitude = np.rint(values[:, c] / 2), np.abs(values[:, c])
        second_index = np.sign(values[:, c]) * np.where(magnitude < 0.5, 0, np.rint((magnitude + 1) / 2))
        indices[:, c] = np.where(second, second_index, first_index)
        state = table[state, indices[:, c] & 1]
    return indices


def entropy_bytes(values):
    counts = np.bincount(values.ravel().view(np.uint8), minlength=256)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def banks():
    return [np.stack([np.load(WEIGHTS / f"gptq_blocks.{i}.{role}.npy") for i in range(6)]) for role in ROLES]


integers = st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=24).flatmap(
    lambda shape: st.tuples(st.integers(-128, 127), st.integers(-128, 127)).flatmap(
        lambda ends: st_numpy.arrays(np.int8, shape, elements=st.integers(min(ends), max(ends)))
    )
)
floats = st.sampled_from([np.uint16, np.uint32]).flatmap(
    lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=8)).map(
        lambda bits: bits.view(np.float16 if dtype == np.uint16 else np.float32)
    )
)


@settings(max_examples=60, deadline=None)
@given(values=integers, mode=st.sampled_from(coder.MODES), states=st.sampled_from(coder.TRELLIS_STATES))
def test_round_trip(values, mode, states):
    assert_same(coder.decode(coder.encode(values, mode, states)), values)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(integers, max_size=5), mode=st.sampled_from(coder.MODES))
def test_round_trip_of_a_list(values, mode):
    decoded = coder.decode(coder.encode(values, mode))
    assert isinstance(decoded, list)
    for found, expected in zip(decoded, values, strict=True):
        assert_same(found, expected)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(floats, max_size=4))
def test_round_trip_of_floats(values):
    for found, expected in zip(coder.decode_floats(coder.encode_floats(values)), values, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("mode", coder.MODES)
@pytest.mark.parametrize(
    "values",
    [
        gaussian(2.4, 200, 300),
        gaussian(70, 30, 400),
        gaussian(0.2, 300, 200),
        gaussian(2.4, 1, 70_001),
        gaussian(2.4, 70_001, 1),
        gaussian(2.4, 5000, 2, 3),
        near_copies(),
        np.random.default_rng(0).integers(-128, 128, (100, 100), np.int8),
        np.full((3, 1000, 1000), -128, np.int8),
        np.where(np.arange(500_000) == 400_000, 127, -128).astype(np.int8),
        gaussian(2, 40, 60)[::-1, ::2],
        np.abs(gaussian(5, 40, 60)) + np.int8(3),
        -np.abs(gaussian(5, 40, 60)) - np.int8(3),
    ],
    ids=lambda values: "x".join(map(str, values.shape)),
)
def test_round_trip_of_special_arrays(mode, values):
    assert_same(coder.decode(coder.encode(values, mode)), values)


def test_torch_tensors_and_names_of_what_is_wrong():
    values = gaussian(3, 20, 30)
    assert coder.encode(torch.from_numpy(values)) == coder.encode(values)
    scales = torch.rand(30).half()
    assert_same(coder.decode_floats(coder.encode_floats(scales)), scales.numpy())
    with pytest.raises(TypeError, match="expected int8, got int16"):
        coder.encode(values.astype(np.int16))
    with pytest.raises(TypeError, match="expected float16 or float32, got int8"):
        coder.encode_floats(values)
    with pytest.raises(ValueError, match="4 dimensions"):
        coder.encode(values.reshape(2, 10, 3, 10))
    with pytest.raises(ValueError, match="mode: 'fast' is not accepted"):
        coder.encode(values, mode="fast")
    with pytest.raises(ValueError, match="trellis_states: 5 is not accepted"):
        coder.encode(values, trellis_states=5)
    with pytest.raises(ValueError, match="4097 tensors"):
        coder.encode([values[0]] * 4097)
    with pytest.raises(ValueError, match="rows of more than"):
        coder.encode(np.zeros((1, 65537), np.int8), trellis_states=8)
    with pytest.raises(ArtifactError, match="holds integers"):
        coder.decode_floats(coder.encode(values))
    with pytest.raises(ArtifactError, match="holds floats"):
        coder.decode(coder.encode_floats(scales))
    with pytest.raises(ArtifactError, match="600 bytes of values; the limit is 599"):
        coder.decode(coder.encode(values), limit_bytes=599)


def test_the_bytes_are_those_of_version_1():
    """A change here is a change of the format: files that people have could no longer be read."""
    grid = np.arange(3 * 40 * 50).reshape(3, 40, 50)
    values = ((grid * grid // 7 + grid // 3) % 13 - (grid * 5 // 11) % 7).astype(np.int8)
    copies = np.concatenate([values[0] * 5, values[0] * 5 + (values[1] > 3)])
    scaled = (values * (grid % 50) // 12).astype(np.int8)  # without such columns mixing is not the smaller one
    steps = (np.arange(500) % 17 / 16).astype(np.float32)
    blobs = {
        "mix": coder.encode([values, copies]),
        "static": coder.encode([values, copies], mode="static"),
        "mix 4": coder.encode(scaled, trellis_states=4),
        "mix 8": coder.encode(scaled, trellis_states=8),
        "static 8": coder.encode(values, mode="static", trellis_states=8),
        "floats": coder.encode_floats([steps, steps.astype(np.float16)]),
    }
    assert {name: hashlib.sha256(blob).hexdigest()[:16] for name, blob in blobs.items()} == {
        "mix": "cb0e86416994619a",
        "static": "c26b2475c024ced4",
        "mix 4": "b0ffc813e82fd568",
        "mix 8": "5297771d948f1b32",
        "static 8": "3d279ca159b9bfba",
        "floats": "aae37ea388bef454",
    }


def test_mixing_is_never_larger_than_tables():
    values = gaussian(20.0, 400, 256)  # nothing to learn but the deviation
    blob = coder.encode(values)
    assert blob == coder.encode(values, mode="static")
    np.testing.assert_array_equal(coder.decode(blob), values)


@pytest.mark.parametrize("mode", coder.MODES)
def test_threads_do_not_change_the_bytes(mode):
    values = gaussian(0.3, 3, 2048, 1024)  # two strips
    blobs = {coder.encode(values, mode, threads=threads) for threads in (1, 2, 4)}
    assert len(blobs) == 1
    for threads in (1, 4):
        assert_same(coder.decode(next(iter(blobs)), threads=threads), values)


@needs_weights
def test_bytes_of_real_weights(banks):
    entropy = sum(entropy_bytes(matrix) for bank in banks for matrix in bank)
    blob = coder.encode(banks)
    assert len(blob) <= 0.9970 * entropy
    for found, bank in zip(coder.decode(blob), banks, strict=True):
        assert_same(found, bank)
    assert len(coder.encode(banks, mode="static")) <= 1.001 * entropy
    octets = np.concatenate([bank.ravel() for bank in banks]).reshape(-1, 2).T.tobytes()
    assert len(blob) <= 0.985 * len(brotli.compress(octets, quality=11, lgwin=24))


@needs_weights
def test_bytes_of_a_real_embedding():
    values = np.load(WEIGHTS / "gptq_tok_emb.npy")
    blob = coder.encode(values)
    assert len(blob) <= 0.962 * len(brotli.compress(values.tobytes(), quality=11, lgwin=24))
    assert_same(coder.decode(blob), values)


@needs_weights
def test_bytes_of_real_scales():
    scales = [np.load(WEIGHTS / f"scale_blocks.{i}.{role}.npy") for i in range(6) for role in ROLES]
    octets = np.concatenate(scales).view(np.uint8).reshape(-1, 2).T.tobytes()
    assert len(coder.encode_floats(scales)) <= 0.97 * len(brotli.compress(octets, quality=11))


def test_bytes_of_gaussians():
    values = gaussian(31 / 12.85, 4, 512, 512)
    entropy = sum(map(entropy_bytes, values))
    octets = values.reshape(-1, 2).T.tobytes()
    size = len(coder.encode(values))
    assert size <= 1.0010 * entropy
    assert size <= 0.99 * len(brotli.compress(octets, quality=11))
    assert len(coder.encode(values, mode="static")) <= 1.0015 * entropy


@pytest.mark.parametrize("mode", coder.MODES)
@pytest.mark.parametrize("states", [4, 8])
def test_the_trellis_is_worth_knowing(mode, states):
    indices = trellis_indices(states, 256, 256)
    assert len(coder.encode(indices, mode, states)) < 0.995 * len(coder.encode(indices, mode))


def test_near_copies_are_found():
    values = near_copies()
    assert len(coder.encode(values)) < 0.75 * len(
        coder.encode(np.concatenate([values[:64], gaussian(6, 64, 96, seed=2)]))
    )


@needs_compiler
@pytest.mark.parametrize("flags", [("-O0",), ("-O3", "-DPGOLF_PORTABLE")], ids=" ".join)
def test_other_builds_make_the_same_bytes(tmp_path, flags):
    program = tmp_path / "driver"
    assert not build(program, "coder_driver", *flags)
    values, indices = gaussian(2.4, 2, 60, 100), trellis_indices(8, 40, 50)
    numbers = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    cases = [
        (near_copies()[None], 0, 0, coder.encode(near_copies()[None])),
        (values, 0, 0, coder.encode(values)),
        (values, 1, 0, coder.encode(values, "static")),
        (indices[None], 0, 8, coder.encode(indices[None], trellis_states=8)),
        (indices[None], 1, 8, coder.encode(indices[None], "static", 8)),
        (numbers[None], 2, 0, coder.encode_floats(numbers[None])),
    ]
    for array, kind, states, expected in cases:
        (tmp_path / "in").write_bytes(array.tobytes())
        arguments = [kind, states, array.itemsize, *array.shape]
        command = [str(program), str(tmp_path / "in"), str(tmp_path / "out"), *map(str, arguments)]
        assert subprocess.run(command).returncode == 0
        assert (tmp_path / "out").read_bytes() == expected


def damage(blob, chance):
    """One to three random changes, half of them to the header."""
    data = bytearray(blob)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(min(len(data), 24) if chance.random() < 0.5 else len(data)) if data else 0
        kind = chance.randrange(5) if data else 3
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.randrange(256)
        elif kind == 2:
            del data[at : at + chance.choice([1, 2, 10_000])]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice([1, 2, 50]))
        else:
            data[at:] = bytes(len(data) - at)
    return bytes(data)


def judge():
    """A second process in bounded memory: decode damaged blobs and say how each ended."""
    import resource

    blobs = sample_blobs()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    ends, longest = {}, 0.0
    for name, blob in blobs.items():
        decode = coder.decode_floats if name == "floats" else coder.decode
        for seed in range(300):
            start = time.monotonic()
            try:
                decoded = decode(damage(blob, random.Random(seed)), limit_bytes=LIMIT_BYTES)
                arrays = decoded if isinstance(decoded, list) else [decoded]
                end = "array" if all(isinstance(each, np.ndarray) for each in arrays) else "?"
            except ArtifactError as error:
                end = "ArtifactError" if "\n" not in str(error) else "?"
            except BaseException as error:
                end = f"{name} {seed}: {type(error).__name__}: {error}"
            ends[end] = ends.get(end, 0) + 1
            longest = max(longest, time.monotonic() - start)
    print(json.dumps([ends, longest]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bound on memory needs Linux")
def test_damaged_blobs_end_in_artifact_errors():
    root = Path(pgolf.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parents[1]))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ends, longest = json.loads(done.stdout)
    assert set(ends) <= {"ArtifactError", "array"}, ends
    assert ends["ArtifactError"] > 0.8 * sum(ends.values())
    assert longest < 2


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "is empty"),
        (b"\1", "ends within its header"),
        (b"\2\0\0\1", "is not of version 1"),
        (b"\1\3\0\1\0\0\0", "is of an unknown kind"),
        (b"\1\0\5\1\0\0\0", "has an unknown trellis"),
        (b"\1\2\4\1\0\2", "has an unknown trellis"),
        (b"\1\0\0\2\0\0\0\0\0\0", "has too many or too few tensors"),
        (b"\1\x80\0\x81\x20", "has too many or too few tensors"),
        (b"\1\0\0\1\4\1\1\1\1\0\0", "too many dimensions"),
        (b"\1\0\0\1\1\x80\x80\x80\x80\x10\0\1", "too many values"),
        (b"\1\0\0\1\2\xff\xff\x7f\xff\xff\x7f\0\1", "too many values"),
        (b"\1\x80\0\2" + 2 * b"\1\x81\x80\x80\x40\0\0", "has too many values"),
        (b"\1\0\0\1\1\3\5\4\1\0", "wrong bounds"),
        (b"\1\0\0\1\1\x80\x80\x80\x40\0\1\0", "too short for its values"),
        (b"\1\0\0\1\1\3\0\1\7\0", "shorter than it says"),
        (b"\1\0\0\1\1\3\0\1\1\0\0", "longer than it says"),
        (b"\1\0\0\1\1\3\4\4\0", "longer than it says"),
        (b"\1\1\0\1\1\3\0\1\1\0", "damaged payload"),
        (b"\1\2\0\1\0\3", "floats of an unknown size"),
    ],
)
def test_hostile_headers(blob, message):
    decode = coder.decode_floats if blob[1:2] == b"\2" else coder.decode
    with pytest.raises(ArtifactError, match=message):
        decode(blob)


if __name__ == "__main__":
    judge()
