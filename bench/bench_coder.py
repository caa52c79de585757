"""Coding quantised weights, both modes on one thread, beside the compressors that people use; sizes over the entropy.

The values are normal, clipped at 12.85 standard deviations and rounded to 6 bits, in a bank of matrices of the record's
size. "+ shuffle": the bytes at even places first, then those at odd ones.
"""

import lzma
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from bench.harness.measure import QUICK, Work
from pgolf.artifact import coder

brotli = pytest.importorskip("brotli", reason="a peer")
zstandard = pytest.importorskip("zstandard", reason="a peer")

SHAPE = (1 if QUICK else 8, 512, 512)
MODES = ["mix", "static"]


def random_weights() -> np.ndarray:
    values = np.random.default_rng().standard_normal(SHAPE, dtype=np.float32)
    return np.clip(np.rint(values * (31 / 12.85)), -31, 31).astype(np.int8)


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum() / 8)


def shuffle(values: np.ndarray) -> bytes:
    return values.reshape(-1, 2).T.tobytes()


COMPRESS: dict[str, Callable[[np.ndarray], bytes]] = {
    "zlib -9": lambda values: zlib.compress(values.tobytes(), 9),
    "lzma -9e": lambda values: lzma.compress(values.tobytes(), preset=9 | lzma.PRESET_EXTREME),
    "zstandard -22": lambda values: zstandard.ZstdCompressor(level=22).compress(values.tobytes()),
    "brotli -11 + shuffle": lambda values: brotli.compress(shuffle(values), quality=11, lgwin=24),
}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": zlib.decompress,
    "lzma -9e": lzma.decompress,
    "zstandard -22": zstandard.ZstdDecompressor().decompress,
    "brotli -11 + shuffle": brotli.decompress,
}


def sizes(values: np.ndarray, mode: str) -> str:
    """The shape, and every size as a share of the order-0 entropy."""
    entropy = sum(entropy_bytes(matrix) for matrix in values)
    found = {mode: len(coder.encode(values, mode, threads=1))}
    if mode == "mix":
        found |= {name: len(compress(values)) for name, compress in COMPRESS.items()}
    told = ", ".join(f"{name} {size / entropy:.4f}" for name, size in found.items())
    return f"{'x'.join(map(str, values.shape))} ({told})"


@pytest.mark.parametrize("mode", MODES)
def test_encode(measure, mode):
    values = random_weights()
    measure(
        "coder.encode",
        mode,
        shape=sizes(values, mode),
        dtype="int8",
        backend="native, 1 thread",
        make=tuple,
        call=lambda: coder.encode(values, mode, threads=1),
        others={name: lambda each=each: each(values) for name, each in COMPRESS.items()} if mode == "mix" else {},
        tolerance=None,
        work=Work(bytes=values.size + len(coder.encode(values, mode))),
    )


@pytest.mark.parametrize("mode", MODES)
def test_decode(measure, mode):
    values = random_weights()
    blob = coder.encode(values, mode)
    packed = {name: compress(values) for name, compress in COMPRESS.items()} if mode == "mix" else {}
    measure(
        "coder.decode",
        mode,
        shape="x".join(map(str, SHAPE)),
        dtype="int8",
        backend="native, 1 thread",
        make=tuple,
        call=lambda: coder.decode(blob, threads=1),
        others={name: lambda name=name: DECOMPRESS[name](packed[name]) for name in packed},
        tolerance=None,
        work=Work(bytes=values.size + len(blob)),
    )
