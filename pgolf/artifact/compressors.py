"""What other compressors make of an artifact's tensors, for comparison only.

They are given the bytes that a `torch.save` of the same tensors would hold, without its frame: a byte a quantised value
as the tensors lie, orders, and floats. "+ shuffle": of each tensor the bytes at even places first, then those at odd
ones, as the accepted entries do.

The record's scheme (challenge entry #1855): of each quantised bank every matrix's rows sorted by the sum of magnitudes,
transposed, one `lrzip -z -L 9` a bank; the permutations, two bytes a row, and all else through brotli.
"""

import lzma
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.artifact.coder import MODES, Array
from pgolf.artifact.file import Artifact, StoredTensor, read_artifact, write_artifact
from pgolf.errors import ArtifactError, UserError, imported


@dataclass(frozen=True)
class Codec:
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]


def _library(name: str) -> Any:
    return imported(name, "the comparison of compressors")


def _brotli(raw: bytes) -> bytes:
    return _library("brotli").compress(raw, quality=11, lgwin=24)


def _of_brotli(data: bytes) -> bytes:
    return _library("brotli").decompress(data)


CODECS = {
    "zlib -9": Codec(lambda raw: zlib.compress(raw, 9), zlib.decompress),
    "lzma -9e": Codec(lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    "zstandard -22": Codec(
        lambda raw: _library("zstandard").ZstdCompressor(level=22).compress(raw),
        lambda data: _library("zstandard").ZstdDecompressor().decompress(data),
    ),
    "brotli -11 + shuffle": Codec(_brotli, _of_brotli),
}


@dataclass(frozen=True)
class Result:
    name: str
    bytes: int
    encode_seconds: float
    decode_seconds: float


def compare(artifact: Artifact) -> list[Result]:
    """Both modes of our coder (whole files) and every compressor there is, on the same tensors."""
    for library in ("brotli", "zstandard"):  # before any work, and not within what is timed
        _library(library)
    tensors = list(artifact.tensors.values())
    results = [_ours(tensors, mode) for mode in MODES]
    plain = b"".join(array.tobytes() for tensor in tensors for array in _arrays(tensor))
    shuffled = b"".join(_shuffle(array.tobytes()) for tensor in tensors for array in _arrays(tensor))
    for name, codec in CODECS.items():
        raw = shuffled if "shuffle" in name else plain
        begin = time.perf_counter()
        data = codec.encode(raw)
        middle = time.perf_counter()
        if codec.decode(data) != raw:
            raise ArtifactError(f"{name}: does not give back what it was given")
        results.append(Result(name, len(data), middle - begin, time.perf_counter() - middle))
    if has_lrzip():
        results.append(_record(tensors))
    return results


def has_lrzip() -> bool:
    return shutil.which("lrzip") is not None


def _ours(tensors: list[StoredTensor], mode: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pgolf"
        begin = time.perf_counter()
        count = write_artifact(path, tensors, {}, mode=mode)
        middle = time.perf_counter()
        read_artifact(path)
        return Result(f"pgolf {mode}", count.total, middle - begin, time.perf_counter() - middle)


def _record(tensors: list[StoredTensor]) -> Result:
    total, rest, encoding, decoding = 0, b"", 0.0, 0.0
    for tensor in tensors:
        values, *others = _arrays(tensor)
        if values.dtype == np.int8 and values.ndim > 1:
            begin = time.perf_counter()
            matrices = values.reshape(-1, *values.shape[-2:])
            orders = np.abs(matrices.astype(np.int32)).sum(-1).argsort(-1, kind="stable")
            columns = np.take_along_axis(matrices, orders[..., None], 1).transpose(0, 2, 1)
            size, seconds = _lrzip(columns.tobytes())
            encoding += time.perf_counter() - begin - seconds
            decoding += seconds
            total += size
            rest += orders.astype("<u2").tobytes()
        else:
            others.append(values)
        rest += b"".join(_shuffle(array.tobytes()) for array in others)
    begin = time.perf_counter()
    data = _brotli(rest)
    middle = time.perf_counter()
    _of_brotli(data)
    encoding, decoding = encoding + middle - begin, decoding + time.perf_counter() - middle
    return Result("record: rows sorted, lrzip -z", total + len(data), encoding, decoding)


def _lrzip(raw: bytes) -> tuple[int, float]:
    """Compressed bytes, and the seconds that it takes to get `raw` back."""
    with tempfile.TemporaryDirectory() as folder:
        path, packed, back = (Path(folder) / name for name in ("raw", "raw.lrz", "back"))
        path.write_bytes(raw)
        _call("lrzip", "-q", "-z", "-L", "9", "-o", str(packed), str(path))
        begin = time.perf_counter()
        _call("lrzip", "-q", "-d", "-o", str(back), str(packed))
        seconds = time.perf_counter() - begin
        if back.read_bytes() != raw:
            raise ArtifactError("lrzip: does not give back what it was given")
        return packed.stat().st_size, seconds


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"{' '.join(command[:4])}: ended with status {done.returncode}: {last}")


def _arrays(tensor: StoredTensor) -> list[Array]:
    parts = (tensor.values, tensor.scale, tensor.order)
    return [part.detach().cpu().contiguous().numpy() for part in parts if part is not None]


def _shuffle(raw: bytes) -> bytes:
    return raw[::2] + raw[1::2]
