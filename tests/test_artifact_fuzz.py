"""Damaged and hostile artifacts end in `ArtifactError`, soon and in little memory.

The files are read by a second process (this file run as a program) whose address space is held to 200 MB above what it
needs to start, so an allocation beyond that is a MemoryError and fails the test.
"""

import copy
import functools
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import brotli
import pytest
import torch
import zstandard

import pgolf
from pgolf import streams
from pgolf.artifact import DEFAULT_LIMIT_BYTES, StoredTensor, read_artifact, write_artifact
from pgolf.errors import ArtifactError

CORRUPTIONS = 2000
SIGNED_MUTATIONS = 1000
MEMORY_BYTES = 200_000_000
SECONDS = 1.0


def sign(manifest, pieces, version=1, size=None):
    """A file with correct checksums around any manifest (object, text or bytes) and any stored streams."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    stored = brotli.compress(text, quality=1)
    header = struct.pack("<8sIII", b"\x89PGOLF\r\n", version, len(stored), len(text) if size is None else size)
    crc = zlib.crc32(header + stored)
    data = [header, struct.pack("<I", crc), stored]
    for piece in pieces:
        length = struct.pack("<I", len(piece))
        crc = zlib.crc32(length + piece, crc)
        data += [length, struct.pack("<I", crc), piece]
    return b"".join(data)


def open_up(data):
    """Manifest and stored streams of a good file."""
    (stored_size,) = struct.unpack_from("<I", data, 12)
    at = 24 + stored_size
    manifest, pieces = json.loads(brotli.decompress(data[24:at])), []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return manifest, pieces


def tensor(name="w", shape=(4, 8), bits=6, values="stored", layout="plain", **changes):
    member = {"name": name, "role": "mlp", "shape": list(shape), "bits": bits, "values": [values, layout]}
    if isinstance(bits, int) and 2 <= bits <= 8:
        member["scale"] = ["stored", "plain"]
    return {**member, **changes}


def manifest(*tensors, **changes):
    return {"metadata": {}, "tensors": list(tensors), **changes}


@functools.cache
def brotli_zeros(count):
    compressor, block = brotli.Compressor(quality=1), bytes(2**20)
    whole, rest = divmod(count, len(block))
    return b"".join([compressor.process(block) for _ in range(whole)] + [compressor.process(bytes(rest))]) + (
        compressor.finish()
    )


def zstd_zeros(count, claim=None):
    """A frame of zeros; with `claim`, its header is made to state that content size and a window of as much."""
    data = zstandard.ZstdCompressor(level=1, write_checksum=False).compress(bytes(count))
    if claim is None:
        return data
    assert data[4] == 0b10000000, "a window of one byte, then a content size of four"
    return data[:4] + struct.pack("<BI", 0b10100000, claim) + data[10:]


def zstd_wide_window(raw, window_log):
    """One raw block in a frame whose header asks for a window of 2**window_log bytes."""
    block = struct.pack("<I", len(raw) << 3 | 1)[:3] + raw
    return struct.pack("<IBBH", 0xFD2FB528, 0b01000000, (window_log - 10) << 3, len(raw) - 256) + block


def nested(depth, inside=b""):
    return b"[" * depth + inside + b"]" * depth


W, S = bytes(32), bytes(8)  # the streams of tensor()
BOMB = 2**28  # more than may be allocated
PLENTY = 60 * 2**20  # values that fit the limit, working copy included
GOOD = manifest(tensor())


def hostile_files():
    """Name -> (file, what the message must say)."""

    def one(expected, member, *pieces):
        return sign(manifest(member), pieces or (W, S)), expected

    def raw(expected, text):
        return sign(text, (W, S)), expected

    def text(**changes):
        return json.dumps({**GOOD, **changes}).encode()

    float_nan = struct.pack("<4e", 1, float("nan"), 1, 1)
    float_inf = struct.pack("<4e", 1, float("inf"), 1, 1)
    return {
        # sizes
        "giant shape": one("limit", tensor(shape=(2**30, 2**30))),
        "giant shape times zero": one("stream w:scale", tensor(shape=(2**20, 0)), b"", b""),
        "giant scale": one("limit", tensor(shape=(2**31 - 1, 0)), b"", b""),
        "overflowing shape": one("limit", tensor(shape=(2**31 - 1,) * 8)),
        "dimension too large": one("shape", tensor(shape=(2**31, 1))),
        "huge dimension": one("shape", tensor(shape=(10**18, 1))),
        "too many dimensions": one("shape", tensor(shape=(1,) * 9)),
        "negative dimension": one("shape", tensor(shape=(-4, -8))),
        "fractional dimension": one("shape", tensor(shape=(4, 8.0))),
        "boolean dimension": one("shape", tensor(shape=(True, 32))),
        "null dimension": one("shape", tensor(shape=(None, 32))),
        "shape is a number": one("shape", {**tensor(), "shape": 32}),
        "shape is text": one("shape", {**tensor(), "shape": "48"}),
        "quantised scalar": one("dimension", tensor(shape=())),
        "just over the limit": one("limit", tensor(shape=(1, DEFAULT_LIMIT_BYTES // 2))),
        "many tensors over the limit": (
            sign(manifest(*[tensor(f"w{i}", (1, 2**24)) for i in range(12)]), [b""] * 24),
            "limit",
        ),
        "too many tensors": (sign(manifest(*[tensor(f"w{i}", (0, 0)) for i in range(1025)]), []), "1025"),
        # streams that lie
        "fewer bytes stored": one("stream w:values", tensor(), W[:-1], S),
        "more bytes stored": one("stream w:values", tensor(), W + b"\0", S),
        "fewer scales": one("stream w:scale", tensor(), W, S[:-2]),
        "a stream missing": one("ends before stream w:scale", tensor(), W),
        "a stream too many": one("follow", tensor(), W, S, b""),
        "streams in the wrong order": one("stream w:values", tensor(), S, W),
        "no streams wanted": (sign(manifest(), [W]), "follow"),
        "brotli: fewer": one("does not decode", tensor(values="brotli"), brotli.compress(W[:-1]), S),
        "brotli: more": one("does not decode", tensor(values="brotli"), brotli.compress(W + b"\0"), S),
        "brotli: cut": one("does not decode", tensor(values="brotli"), brotli.compress(W)[:-1], S),
        "brotli: trailing": one("brotli", tensor(values="brotli"), brotli.compress(W) + b"\0", S),
        "brotli: empty": one("does not decode", tensor(values="brotli"), b"", S),
        "brotli: rubbish": one("brotli", tensor(values="brotli"), b"\xff" * 99, S),
        "brotli: bomb": one("does not decode", tensor(values="brotli"), brotli_zeros(BOMB), S),
        "brotli: bomb in scale": one(
            "does not decode", tensor(scale=["brotli", "plain"]), W, brotli_zeros(BOMB)
        ),
        "brotli: nothing to hold": one("no values", tensor(shape=(0, 8), values="brotli"), brotli.compress(b""), b""),
        "zstd: fewer": one("does not decode", tensor(values="zstd"), zstandard.compress(W[:-1]), S),
        "zstd: more": one("does not decode", tensor(values="zstd"), zstandard.compress(W + b"\0"), S),
        "zstd: cut": one("zstandard", tensor(values="zstd"), zstandard.compress(W)[:-1], S),
        "zstd: trailing": one("zstandard", tensor(values="zstd"), zstandard.compress(W) + b"\0", S),
        "zstd: two frames": one("zstandard", tensor(values="zstd"), zstandard.compress(W) * 2, S),
        "zstd: empty": one("zstandard", tensor(values="zstd"), b"", S),
        "zstd: rubbish": one("zstandard", tensor(values="zstd"), b"\xff" * 99, S),
        "zstd: bomb": one("does not decode", tensor(values="zstd"), zstd_zeros(BOMB), S),
        "zstd: bomb that lies": one("zstandard", tensor(values="zstd"), zstd_zeros(BOMB, claim=32), S),
        "zstd: content size that lies": one(
            "zstandard", tensor(shape=(1, PLENTY), values="zstd"), zstd_zeros(2**24, claim=PLENTY), S[:2]
        ),
        "zstd: window": one("window", tensor(shape=(4, 100), values="zstd"), zstd_wide_window(bytes(400), 30), S),
        "zstd: no content size": one(
            "does not decode",
            tensor(values="zstd"),
            zstandard.ZstdCompressor(write_content_size=False).compress(W),
            S,
        ),
        "large, then wrong": (
            sign(
                manifest(tensor("a", (1, PLENTY), values="brotli"), tensor("b")),
                [brotli_zeros(PLENTY), S[:2], b"\x7f" * 32, S],
            ),
            "tensor b: values",
        ),
        "large and packed, then wrong": (
            sign(
                manifest(tensor("a", (1, PLENTY), 7, values="brotli", layout="packed"), tensor("b")),
                [brotli_zeros(PLENTY * 7 // 8), S[:2], b"\x7f" * 32, S],
            ),
            "tensor b: values",
        ),
        "large and planes, then wrong": (
            sign(
                manifest(tensor("a", (PLENTY // 4,), 32, values="zstd", layout="planes"), tensor("b")),
                [zstd_zeros(PLENTY), b"\x7f" * 32, S],
            ),
            "tensor b: values",
        ),
        # values
        "beyond six bits": one("-32..31", tensor(), b"\x20" * 32, S),
        "below six bits": one("-32..31", tensor(), b"\xdf" * 32, S),
        "NaN scale": one("finite", tensor(), W, float_nan),
        "infinite scale": one("finite", tensor(), W, float_inf),
        "NaN value": one("finite", tensor(shape=(4,), bits=16), float_nan),
        "infinite value": one("finite", tensor(shape=(1,), bits=32), struct.pack("<f", float("-inf"))),
        # words
        "version 0": (sign(GOOD, (W, S), version=0), "version 0"),
        "version 2": (sign(GOOD, (W, S), version=2), "version 2"),
        "unknown codec": one("codec", tensor(values="pickle")),
        "unknown layout": one("layout", tensor(layout="shuffled")),
        "layout of another width": one("layout", tensor(layout="planes")),
        "packed float": one("layout", tensor(shape=(4,), bits=16, layout="packed"), S),
        "codec is a list": one("[codec, layout]", tensor(values=["stored"])),
        "encoding of three": one("[codec, layout]", {**tensor(), "values": ["stored", "plain", "plain"]}),
        "encoding is text": one("[codec, layout]", {**tensor(), "values": "st"}),
        "encoding is an object": one("[codec, layout]", {**tensor(), "values": {"stored": 0, "plain": 1}}),
        "unknown role": one("role", tensor(role="pickle")),
        "role is a list": one("role", tensor(role=["mlp"])),
        **{f"bits {bits!r}": one("bits", tensor(bits=bits, scale=["stored", "plain"])) for bits in (0, 1, -6, 2**70)},
        **{f"bits {bits!r}": one("members", tensor(bits=bits, scale=["stored", "plain"])) for bits in (9, 16, 64)},
        **{f"bits {bits!r}": one("bits", {**tensor(), "bits": bits}) for bits in (True, 6.0, "6", None, [6])},
        "name missing": one("members", {key: value for key, value in tensor().items() if key != "name"}),
        "scale missing": one("members", {key: value for key, value in tensor().items() if key != "scale"}),
        "member too many": one("members", tensor(zero=0)),
        **{
            f"name {name!r:.20}": one("name", tensor(name=name))
            for name in ("", "a b", "a\n", "a\x00", "é", "x" * 129, 7, None, ["w"], "\ud800", "w:values")
        },
        "name twice": (sign(manifest(tensor(), tensor()), (W, S, W, S)), "twice"),
        "tensor is a list": one("object", [1, 2]),
        "tensors is an object": (sign({"metadata": {}, "tensors": {}}, ()), "list"),
        "manifest is a list": raw("members", b"[]"),
        "manifest has more": raw("members", text(code="print()")),
        # JSON
        "not JSON": raw("JSON", b"{"),
        "not UTF-8": raw("JSON", b"\xff\xfe{}"),
        "UTF-16": raw("JSON", json.dumps(GOOD).encode("utf-16")),
        "with a byte order mark": raw("JSON", json.dumps(GOOD).encode("utf-8-sig")),
        "nothing": raw("JSON", b""),
        "two values": raw("JSON", text() + b"{}"),
        "key twice": raw("twice", b'{"metadata":{},"metadata":{},"tensors":[]}'),
        "key twice in metadata": raw("twice", b'{"metadata":{"a":{"b":1,"b":1}},"tensors":[]}'),
        "deep lists": raw("JSON", nested(120_000)),
        "deep objects": raw("JSON", b'{"a":' * 40_000 + b"1" + b"}" * 40_000),
        "deep metadata": raw("deeper", b'{"metadata":{"a":' + nested(200) + b'},"tensors":[]}'),
        "NaN in metadata": raw("NaN", b'{"metadata":{"a":NaN},"tensors":[]}'),
        "Infinity in metadata": raw("Infinity", b'{"metadata":{"a":-Infinity},"tensors":[]}'),
        "1e999 in metadata": raw("finite", b'{"metadata":{"a":1e999},"tensors":[]}'),
        "huge integer": raw("64 bits", b'{"metadata":{"a":' + b"9" * 250_000 + b'},"tensors":[]}'),
        "huge dimension in digits": raw("64 bits", b'{"metadata":{},"tensors":[' + b"1" * 5000 + b"]}"),
        "integer of 65 bits": raw("64 bits", text(metadata={"a": 2**64})),
        "half a character": raw("surrogates", b'{"metadata":{"a":"\\ud800"},"tensors":[]}'),
        "metadata is a list": raw("metadata", text(metadata=[])),
        "metadata is null": raw("metadata", text(metadata=None)),
        "many empty lists": raw("87001 tensors", b'{"metadata":{},"tensors":[' + b"[]," * 87_000 + b"[]]}"),
        "manifest too long": raw("at most", b" " * 2**20 + text()),
        "manifest bomb": (sign(b" " * 2**24, (), size=2**18), "does not decode"),
        "manifest shorter than said": (sign(GOOD, (W, S), size=len(json.dumps(GOOD)) + 1), "does not decode"),
        "manifest longer than said": (sign(GOOD, (W, S), size=len(json.dumps(GOOD)) - 1), "does not decode"),
        "manifest of 4 GiB": (sign(GOOD, (W, S), size=2**32 - 1), "at most"),
        # the frame around it
        "empty file": (b"", "not a pgolf artifact"),
        "magic alone": (sign(GOOD, (W, S))[:8], "header"),
        "header alone": (sign(GOOD, (W, S))[:24], "manifest"),
        "length of 4 GiB": (sign(GOOD, (W,)) + b"\xff" * 4 + S, "ends within stream w:scale"),
        "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not a pgolf artifact"),
    }  # fmt: skip


def sample_model():
    """About a megabyte when stored."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randint(-128, 128, (1024, 512), generator=generator).to(torch.int8)
    bank = torch.randint(-32, 32, (4, 256, 400), generator=generator).to(torch.int8)
    small = (torch.randn(3, 8, 40, generator=generator) * 6).round().clamp(-16, 15).to(torch.int8)
    return [
        StoredTensor("embedding", "embedding", (1024, 512), embedding, torch.rand(1024, generator=generator).half(), 8),
        StoredTensor("bank", "mlp", (4, 256, 400), bank, torch.rand(4, 256, generator=generator).half(), 6),
        StoredTensor("small", "attention", (3, 8, 40), small, torch.rand(3, 8, generator=generator).half(), 5),
        StoredTensor("gain", "control", (30,), torch.rand(30, generator=generator).half(), None, 16),
        StoredTensor("mix", "control", (), torch.rand((), generator=generator), None, 32),
    ]


def corrupt(data, chance):
    """One random corruption: a flipped bit or more bytes, a truncation, an excision, an insertion, a spliced length."""
    data = bytearray(data)
    kind = chance.randrange(7)
    at = chance.choice([chance.randrange(len(data)), chance.randrange(min(len(data), 2000))])
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + chance.choice([1, 4, 8, 1000])]
    elif kind == 4:
        data[at:at] = chance.randbytes(chance.choice([1, 4, 8, 1000]))
    elif kind == 5:  # a length of the header or of a stream
        (stored_size,) = struct.unpack_from("<I", data, 12)
        places, at = [8, 12, 16], 24 + stored_size
        while at < len(data):
            places.append(at)
            at += 8 + struct.unpack_from("<I", data, at)[0]
        place = chance.choice(places)
        (length,) = struct.unpack_from("<I", data, place)
        wrong = [0, 1, length + 1, max(length - 1, 0), length ^ 1 << chance.randrange(32), 2**31, 2**32 - 1]
        struct.pack_into("<I", data, place, chance.choice([each for each in wrong if each != length]))
    else:  # one piece of the file over another
        size = chance.choice([4, 24, 1000])
        data[at : at + size] = data[chance.randrange(len(data) - size) :][:size]
    return bytes(data)


JUNK = [
    *(None, True, False, 0, 1, -1, 2, 8, 16, 32, 2**31, 2**63, 0.5, 1e300, "", "w", "mlp", "stored", "brotli", "zstd"),
    *("plain", "packed", "planes", [], [[]], {}, {"a": 1}, [4, 8], [0], ["zstd", "packed"], ["stored", "planes"]),
]


def mutate_and_sign(data, chance):
    """Change the manifest or a stored stream at random, and sign the result, so that only the later checks are left."""
    described, pieces = copy.deepcopy(open_up(data))
    if chance.random() < 0.5:
        index = chance.randrange(len(pieces))
        piece = bytearray(pieces[index] or b"\0")
        for _ in range(chance.randrange(1, 4)):
            piece[chance.choice([0, chance.randrange(len(piece)), chance.randrange(min(len(piece), 16))])] ^= (
                1 << chance.randrange(8)
            )
        pieces[index] = bytes(piece)
    else:
        value = described
        while True:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = chance.choice(keys) if keys else None
            if key is None or not isinstance(value[key], dict | list) or chance.random() < 0.2:
                break
            value = value[key]
        if key is None:
            described["metadata"] = chance.choice(JUNK)
        elif chance.random() < 0.2:
            del value[key]
        else:
            value[key] = chance.choice(JUNK)
    return sign(described, pieces)


def read_here(path):
    """How reading `path` ended: error type or "", message, seconds."""
    start = time.monotonic()
    try:
        for each in read_artifact(path).tensors.values():
            each.dequantize(torch.float16)
        kind, message = "", ""
    except BaseException as error:
        kind, message = type(error).__name__, str(error)
    return kind, message, time.monotonic() - start


def judge(folder):
    """The second process: read every file of `folder`, then corruptions of its good one, in bounded memory."""
    import resource

    torch.set_num_threads(1)
    good = folder / "good.pgolf"
    data = good.read_bytes()
    assert read_here(good)[0] == ""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        bytearray(MEMORY_BYTES * 5 // 4)
        raise SystemExit("the limit on memory does not hold")
    except MemoryError:
        pass
    results = {path.stem: read_here(path) for path in sorted(folder.glob("hostile*"))}
    trial = folder / "trial.pgolf"
    small = (folder / "small.pgolf").read_bytes()
    for kind, count, whole, spoil in (
        ("corrupt", CORRUPTIONS, data, corrupt),
        ("signed", SIGNED_MUTATIONS, small, mutate_and_sign),
    ):
        for seed in range(count):
            spoilt = spoil(whole, random.Random(seed))
            if spoilt != whole:
                trial.write_bytes(spoilt)
                results[f"{kind}{seed}"] = read_here(trial)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def hostile():
    return hostile_files()


@pytest.fixture(scope="module")
def results(tmp_path_factory, hostile):
    if not sys.platform.startswith("linux"):
        pytest.skip("the bound on memory needs Linux")
    folder = tmp_path_factory.mktemp("hostile")
    write_artifact(folder / "good.pgolf", sample_model(), {"model": {"dim": 512}, "tokenizer": "demo"})
    write_artifact(folder / "small.pgolf", sample_model()[2:], {"model": {"dim": 512}, "tokenizer": "demo"})
    for index, (data, _) in enumerate(hostile.values()):
        (folder / f"hostile{index}.pgolf").write_bytes(data)
    root = Path(pgolf.__file__).parents[1]
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_refused(result):
    kind, message, seconds = result
    assert kind == "ArtifactError", message
    assert "\n" not in message
    assert ".pgolf" in message
    assert len(message) < 500
    assert seconds < SECONDS


def test_hostile_files_with_correct_checksums(hostile, results):
    for index, (name, (_, expected)) in enumerate(hostile.items()):
        result = results[f"hostile{index}"]
        assert result[0] == "ArtifactError", f"{name}: {result}"
        assert expected in result[1], f"{name}: {result}"
        assert_refused(result)


def test_random_corruptions(results):
    found = [result for name, result in results.items() if name.startswith("corrupt")]
    assert len(found) > 0.99 * CORRUPTIONS  # a corruption may by chance leave the file as it was
    for result in found:
        assert_refused(result)
    assert len({message.split(":", 1)[1][:30] for _, message, _ in found}) >= 6


def test_random_mutations_with_correct_checksums(results):
    found = [result for name, result in results.items() if name.startswith("signed")]
    refused = [result for result in found if result[0]]
    assert len(found) > 0.9 * SIGNED_MUTATIONS
    assert len(refused) > 0.3 * len(found)  # the others are other weights, and as good a file as any
    for result in refused:
        assert_refused(result)


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "small.pgolf"
    values = (torch.arange(64).reshape(8, 8) % 13).to(torch.int8)
    weights = StoredTensor("w", "mlp", (8, 8), values, torch.ones(8).half(), 6)
    write_artifact(path, [weights, StoredTensor("g", "control", (2,), torch.ones(2), None, 32)], {})
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            read_artifact(path)


def test_every_truncation_and_every_exchange_of_streams_is_detected(tmp_path):
    path = tmp_path / "small.pgolf"
    values = torch.arange(-16, 16, dtype=torch.int8).reshape(4, 8)
    tensors = [
        StoredTensor(name, "mlp", (4, 8), values + add, torch.ones(4).half(), 6) for add, name in enumerate("ab")
    ]
    write_artifact(path, tensors, {})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            read_artifact(path)
    sizes = [8 + len(piece) for piece in open_up(data)[1]]
    start = len(data) - sum(sizes)
    assert sizes[:2] == sizes[2:]
    middle = start + sizes[0] + sizes[1]
    path.write_bytes(data[:start] + data[middle:] + data[start:middle])
    with pytest.raises(ArtifactError, match="checksum"):
        read_artifact(path)


def test_files_that_are_not_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "below", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match=path.name):
            read_artifact(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe"):
        read_artifact(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match="limit"):
        read_artifact(tmp_path / "sparse")


def test_reading_survives_a_name_with_a_line_break(tmp_path):
    path = tmp_path / "two\nlines.pgolf"
    path.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("size", [0, 1, 100, 32751, 32752, 32753, 2**20])
def test_codecs_return_exactly_what_was_declared(codec, size):
    raw = random.Random(size).randbytes(size)
    data = memoryview(streams.CODECS[codec].encode(raw))
    assert streams.CODECS[codec].decode(data, size) == raw
    for wrong in {size - 1, size + 1, 2 * size + 5} - {-1}:
        with pytest.raises(ValueError):
            streams.CODECS[codec].decode(data, wrong)


if __name__ == "__main__":
    judge(Path(sys.argv[1]))
