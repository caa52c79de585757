"""Artifacts made wrong on purpose, with correct checksums: what the fuzzing test reads."""

import functools
import json
import struct
import zlib

import brotli
import zstandard

from pgolf.artifact import DEFAULT_LIMIT_BYTES


def sign(manifest, pieces, version=2, size=None):
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
        member["states"] = 0
    return {**member, **changes}


def trellis(states=8, order="stored", **changes):
    return tensor(states=states, order=[order, "plain"], **changes)


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
        # a trellis
        **{f"states {each!r}": one("states", trellis(each)) for each in (1, 6, 16, -8, True, "8", 8.0, None, [8])},
        "states missing": one("states", {key: value for key, value in tensor().items() if key != "states"}),
        "states of floats": one("members", tensor(shape=(4,), bits=16, states=0), S),
        "order without states": one("members", trellis(0)),
        "states without order": one("members", tensor(states=8)),
        "order missing": one("ends before stream w:order", trellis(), W, S),
        "fewer classes": one("stream w:order", trellis(), W, S, S[:-1]),
        "classes beyond two bits": one("order: 4", trellis(), W, S, b"\x02" * 8),
        "trellis of one dimension": one("trellis", trellis(shape=(8,)), S, S[:2], S),
        "trellis of four dimensions": one("trellis", trellis(shape=(1, 1, 4, 8)), W, S, S),
        "trellis of wide rows": one("trellis", trellis(shape=(1, 65537))),
        "giant order": one("limit", trellis(shape=(2**31 - 1, 0, 65536))),
        "giant empty matrices": one("stream w:order", trellis(shape=(1200, 0, 65536)), b"", b"", S),
        "many small matrices, then wrong": (
            sign(
                manifest(tensor("a", (PLENTY // 3, 1, 1), states=8, order=["brotli", "plain"], values="brotli",
                                scale=["brotli", "plain"]), tensor("b")),
                [brotli_zeros(PLENTY // 3), brotli_zeros(PLENTY // 3 * 2), brotli_zeros(PLENTY // 3), b"\x7f" * 32, S],
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
        "version 1": (sign(GOOD, (W, S), version=1), "version 1"),
        "version 3": (sign(GOOD, (W, S), version=3), "version 3"),
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
