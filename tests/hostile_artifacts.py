"""Artifacts made wrong on purpose, with correct checksums: what the fuzzing test reads."""

import json
import struct
import zlib

import brotli
import numpy as np

from pgolf.artifact import coder
from pgolf.artifact.file import DEFAULT_LIMIT_BYTES


def sign(manifest, pieces, version=3, size=None):
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


def tensor(name="w", shape=(4, 8), bits=6, **changes):
    member = {"name": name, "role": "mlp", "shape": list(shape), "bits": bits}
    if isinstance(bits, int) and 2 <= bits <= 8:
        member["states"] = 0
    return {**member, **changes}


def trellis(states=8, **changes):
    return tensor(states=states, **changes)


def manifest(*tensors, **changes):
    return {"metadata": {}, "tensors": list(tensors), **changes}


def nested(depth, inside=b""):
    return b"[" * depth + inside + b"]" * depth


def ints(*arrays, single=False, mode="mix"):
    """A blob of int8 arrays: zeros of a shape, or what is given; a list unless `single`."""
    whole = [np.zeros(each, np.int8) if isinstance(each, tuple) else np.asarray(each, np.int8) for each in arrays]
    return coder.encode(whole[0] if single else whole, mode)


def floats(*arrays, dtype=np.float16, single=False):
    whole = [np.ones(each, dtype) if isinstance(each, tuple) else np.asarray(each, dtype) for each in arrays]
    return coder.encode_floats(whole[0] if single else whole)


def values(array, mode="mix"):
    return ints(array, single=True, mode=mode)


def number(value):
    """As the coder writes one."""
    digits = []
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def long_blob(kind, rows, columns, fill, payload_bytes):
    """A blob whose payloads are one byte over and over, of values between -128 and 127."""
    strips = -(-rows // (2**22 // columns))
    share = payload_bytes // strips
    shape = b"\2" + number(rows) + number(columns)
    return bytes([1, kind, 0, 1]) + shape + b"\x80\x7f" + number(share) * strips + fill * (share * strips)


W, S, ORDER = values((4, 8)), floats((4,)), ints((1, 8))  # the streams of tensor() and trellis()
PLENTY = 60 * 2**20  # values that fit the limit, working copy included
MANY = 200_000
GOOD = manifest(tensor())


def hostile_files():
    """Name -> (file, what the message must say)."""

    def one(expected, member, *pieces):
        return sign(manifest(member), pieces or (W, S)), expected

    def raw(expected, text):
        return sign(text, (W, S)), expected

    def text(**changes):
        return json.dumps({**GOOD, **changes}).encode()

    nan, infinite = [1, float("nan"), 1, 1], [1, float("inf"), 1, 1]
    wrong = values(np.full((4, 8), 127))
    return {
        # sizes
        "giant shape": one("limit", tensor(shape=(2**30, 2**30))),
        "giant shape times zero": one("stream mlp:scales does", tensor(shape=(2**20, 0)), values((2**20, 0)), S),
        "giant scale": one("limit", tensor(shape=(2**31 - 1, 0)), b"", b""),
        "nothing of giant width": one("limit", tensor(shape=(0, 2**30)), b"", b""),
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
        "fewer values": one("stream w:values does not hold", tensor(), values((4, 7)), S),
        "another shape": one("stream w:values does not hold", tensor(), values((8, 4)), S),
        "one dimension": one("stream w:values does not hold", tensor(), values((32,)), S),
        "a list of values": one("stream w:values does not hold", tensor(), ints((4, 8)), S),
        "floats for values": one("stream w:values does not hold", tensor(), floats((4, 8), single=True), S),
        "fewer scales": one("stream mlp:scales does not hold", tensor(), W, floats((3,))),
        "scales of four bytes": one("stream mlp:scales does not hold", tensor(), W, floats((4,), dtype=np.float32)),
        "scales alone": one("stream mlp:scales does not hold", tensor(), W, floats((4,), single=True)),
        "two arrays of scales": one("stream mlp:scales does not hold", tensor(), W, floats((4,), (4,))),
        "no scales": one("stream mlp:scales does not hold", tensor(), W, floats()),
        "integers for scales": one("stream mlp:scales does not hold", tensor(), W, ints((4,))),
        "floats of another width": one("does not hold", tensor(shape=(4,), bits=32), floats((4,))),
        "values cut": one("stream w:values", tensor(), values(np.arange(32).reshape(4, 8))[:-1], S),
        "values and more": one("longer than it says", tensor(), W + b"\0", S),
        "values empty": one("stream w:values is empty", tensor(), b"", S),
        "values rubbish": one("stream w:values", tensor(), b"\xff" * 99, S),
        "values a pickle": one("stream w:values", tensor(), b"\x80\x04cos\nsystem\n(S'true'\ntR.", S),
        "a stream missing": one("ends before stream mlp:scales", tensor(), W),
        "a stream too many": one("follow", tensor(), W, S, b""),
        "streams in the wrong order": one("stream w:values", tensor(), S, W),
        "no streams wanted": (sign(manifest(), [W]), "follow"),
        "blob of two times the values": one("does not hold", tensor(), values((8, 8)), S),
        "blob of 256 MiB": one("does not hold", tensor(), bytes([1, 0, 0, 1, 1]) + number(2**28) + b"\3\3", S),
        "blob of 2 GiB": one("too many values", tensor(), bytes([1, 0, 0, 1, 1]) + number(2**31) + b"\3\3", S),
        "blob of many tensors": one("too many or too few", tensor(), bytes([1, 128, 0]) + number(4097), S),
        # long work asked for with few bytes
        **{
            f"long work: {name} {fill!r}": one(
                expected, tensor(shape=(rows, 1024), bits=8), long_blob(kind, rows, 1024, fill, size), floats((rows,))
            )
            for fill in (b"\0", b"\xff")
            for name, kind, rows, size, expected in (
                ("mix", 0, 4096, 140_000, "damaged"),
                ("mix, too short", 0, 40960, 500, "too short"),
                ("static", 1, 8192, 140_000, "damaged"),
                ("static, too short", 1, 40960, 500, "too short"),
            )
        },
        "long work: floats": one(
            "too short", tensor(shape=(10_000_000,), bits=16),
            bytes([1, 130, 0, 1, 1]) + number(10_000_000) + b"\2" + number(1000) + bytes(1000),
        ),
        "large, then wrong": (
            sign(
                manifest(tensor("a", (1, PLENTY), 8), tensor("b")),
                [bytes([1, 0, 0, 1, 2, 1]) + number(PLENTY) + b"\5\5", wrong, floats((1,), (4,))],
            ),
            "tensor b: values",
        ),
        # a trellis
        **{f"states {each!r}": one("states", trellis(each)) for each in (1, 6, 16, -8, True, "8", 8.0, None, [8])},
        "states missing": one("members", {key: value for key, value in tensor().items() if key != "states"}),
        "states of floats": one("members", tensor(shape=(4,), bits=16, states=0), S),
        "order missing": one("ends before stream mlp:orders", trellis(), W, S),
        "order of no trellis": one("follow", tensor(), W, S, ORDER),
        "fewer classes": one("stream mlp:orders does not hold", trellis(), W, S, ints((1, 7))),
        "classes beyond two bits": one("order lies in 0..4", trellis(), W, S, ints([[4] + [0] * 7])),
        "negative classes": one("order lies in -1..0", trellis(), W, S, ints([[-1] + [0] * 7])),
        "trellis of one dimension": one("trellis", trellis(shape=(8,))),
        "trellis of four dimensions": one("trellis", trellis(shape=(1, 1, 4, 8))),
        "trellis of wide rows": one("trellis", trellis(shape=(1, 65537))),
        "giant order": one("limit", trellis(shape=(2**31 - 1, 0, 65536))),
        "giant empty matrices": one("limit", trellis(shape=(1200, 0, 65536))),
        "many small matrices, then wrong": (
            sign(
                manifest(tensor("a", (MANY, 1, 1), states=8), tensor("b")),
                [values((MANY, 1, 1)), wrong, floats((MANY, 1), (4,)), ints((MANY, 1))],
            ),
            "tensor b: values",
        ),
        # values
        "beyond six bits": one("-32..31", tensor(), values(np.full((4, 8), 32)), S),
        "below six bits": one("-32..31", tensor(), values(np.full((4, 8), -33)), S),
        "NaN scale": one("finite", tensor(), W, floats(nan)),
        "infinite scale": one("finite", tensor(), W, floats(infinite)),
        "NaN value": one("finite", tensor(shape=(4,), bits=16), floats(nan)),
        "infinite value": one("finite", tensor(shape=(1,), bits=32), floats([-np.inf], dtype=np.float32)),
        # words
        "version 0": (sign(GOOD, (W, S), version=0), "version 0"),
        "version 1": (sign(GOOD, (W, S), version=1), "version 1"),
        "version 2": (sign(GOOD, (W, S), version=2), "version 2; this build reads version 3"),
        "version 4": (sign(GOOD, (W, S), version=4), "version 4"),
        "unknown role": one("role", tensor(role="pickle")),
        "role is a list": one("role", tensor(role=["mlp"])),
        **{f"bits {bits!r}": one("bits", tensor(bits=bits)) for bits in (0, 1, -6, 2**70)},
        **{f"bits {bits!r}": one("members", tensor(bits=bits, states=0)) for bits in (9, 16, 64)},
        **{f"bits {bits!r}": one("bits", {**tensor(), "bits": bits}) for bits in (True, 6.0, "6", None, [6])},
        "name missing": one("members", {key: value for key, value in tensor().items() if key != "name"}),
        "member too many": one("members", tensor(zero=0)),
        **{
            f"name {name!r:.20}": one("name", tensor(name=name))
            for name in ("", "a b", "a\n", "a\x00", "é", "x" * 129, 7, None, ["w"], "\ud800", "w:values")
        },
        "name twice": (sign(manifest(tensor(), tensor()), (W, W, S)), "twice"),
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
        "length of 4 GiB": (sign(GOOD, (W,)) + b"\xff" * 4 + S, "ends within stream mlp:scales"),
        "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not a pgolf artifact"),
    }  # fmt: skip
