"""Good inputs of the fuzz targets in tests/fuzz, made by the package as it is: what a fuzzer starts from."""

import struct
from pathlib import Path

import numpy as np

from pgolf import NgramCache
from pgolf.artifact import coder

MIXINGS = ("adaptive", "dirichlet", "pyp", "tilt")
COUNTS_AT = {"adaptive": 80 + 8 + 16 * 12 * 8 * 16, "tilt": 80}  # of a snapshot: behind settings and weights


def write_seeds(target: str, folder: Path) -> list[Path]:
    """The files, one an input."""
    inputs = {"coder": coder_inputs, "ngram": ngram_inputs, "kernels": kernel_inputs}[target]()
    paths = [folder / f"{target}-{i}" for i in range(len(inputs))]
    for path, data in zip(paths, inputs, strict=True):
        path.write_bytes(data)
    return paths


def numbers(*values: int) -> bytes:
    """As `Input::number` takes them, each less the least that is accepted."""
    return struct.pack(f"<{len(values)}H", *values)


def sample_blobs() -> dict[str, bytes]:
    random = np.random.default_rng(0)

    def gaussian(deviation, *shape):
        return np.clip(np.rint(random.standard_normal(shape) * deviation), -128, 127).astype(np.int8)

    floats = random.standard_normal(60).astype(np.float32)
    mixed = [gaussian(0.4, 2, 32, 32), gaussian(50, 5, 20), np.zeros((30, 30), np.int8), gaussian(0.3, 5, 30)]
    rows, indices = gaussian(6, 10, 16), gaussian(1.2, 10, 20)
    return {
        "mix": coder.encode(mixed),
        "copies": coder.encode(np.concatenate([rows, rows[::-1] + gaussian(0.5, 10, 16)])),
        "static": coder.encode(mixed, mode="static"),
        "trellis": coder.encode(indices, trellis_states=8),
        "static trellis": coder.encode(indices, mode="static", trellis_states=4),
        "empty": coder.encode(np.zeros((0, 5), np.int8)),
        "constant": coder.encode(np.full((100, 100), 3, np.int8)),
        "floats": coder.encode_floats([floats, floats.astype(np.float16)]),
        "small": coder.encode(gaussian(1, 4, 5)),
        "small floats": coder.encode_floats(floats[:5]),
    }


def coder_inputs() -> list[bytes]:
    random = np.random.default_rng(1)
    inputs = [b"\0" + blob for blob in sample_blobs().values()]
    small = random.integers(-3, 9, (1, 6, 20), np.int8)
    for kind, states in ((0, 0), (0, 8), (1, 0), (1, 4)):
        blob = coder.encode(small, mode=coder.MODES[kind], trellis_states=states)
        payload = blob[11:] if blob[1] == kind else coder.encode(small, mode="static", trellis_states=states)[11:]
        inputs.append(b"\1" + numbers(blob[1], states // 4, 0, 5, 19) + struct.pack("bb", -3, 8) + payload)
    inputs.append(b"\1" + numbers(2, 0, 5, 19) + b"\0" + coder.encode_floats(np.ones((1, 6, 20), np.float32))[10:])
    for kind in range(3):
        states = [1] * (kind < 2)
        inputs.append(b"\2" + numbers(kind, 1, *states, 2, 40, 20) + b"\1" * (kind == 2) + random.bytes(63))
    return inputs


def change(part: int, at: int, value: int) -> bytes:
    """Of eight bytes of a snapshot, at `at` in its part `part`."""
    return bytes([part]) + numbers(at, 3) + struct.pack("<Q", value)


def beyond_32_bits() -> bytes:
    """A snapshot after 2^32 + 100,000 tokens, of which 128 are on record; the stream goes on with new ones."""
    position = (1 << 32) + 100_000
    streams = numbers(3, 100) + bytes([0, 1, 2, 0]) + numbers(2, 10) + bytes([5, 6, 0])
    return numbers(8, 1, 0, 0) + b"\0" + streams + numbers(2) + change(1, 0, position) + change(1, 272, position)


def ngram_inputs() -> list[bytes]:
    inputs = [beyond_32_bits()]
    phrase, steps = np.arange(30) * 7 % 11, b"\3"
    stream = numbers(len(phrase), 12) + phrase.astype(np.uint8).tobytes() + steps
    for kind, mixing in enumerate(MIXINGS):
        for resets in (False, True):
            settings = numbers(18, 3, kind, 3 if resets else 0) + b"\1" * resets
            inputs.append(settings + b"\0" + stream + stream + numbers(0))
            # and the same with the counts of another stream
            cache = NgramCache(
                20,
                [5] if mixing == "tilt" else [2, 3, 4, 5],
                mixing,
                20 * 16 + 4096 + 512 * 121,
                document_reset=resets,
                boundary_token=2 if resets else None,
            )
            cache.update(np.arange(60) ** 2 % 17)
            counts = cache.snapshot()[COUNTS_AT.get(mixing, COUNTS_AT["adaptive"]) : -8]
            inputs.append(settings + b"\x79" + numbers(0, 0) + b"\0" + stream + numbers(0) + counts)
    return inputs


def kernel_inputs() -> list[bytes]:
    random = np.random.default_rng(2)
    inputs = [b"\0" + numbers(bits, spare) + b"\1" + random.bytes(90) for bits, spare in ((5, 0), (7, 3), (0, 7))]
    floats = random.standard_normal(12).astype(np.float32).tobytes()
    classes = bytes(range(4)) * 5 * 2
    inputs += [b"\1" + numbers(2, 6, 20) + states + classes + floats + random.bytes(240) for states in (b"\0", b"\1")]
    for tame in (b"\0", b"\1"):
        weights = random.standard_normal(1000).astype(np.float32).tobytes() if tame == b"\0" else random.bytes(1500)
        inputs += [b"\2" + numbers(19, 9, 30) + states + numbers(3) + tame + weights for states in (b"\0", b"\1")]
    return inputs
