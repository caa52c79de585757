"""The artifact: one file `*.pgolf` that holds a model's tensors in as few bytes as the codecs allow. No pickle.

Layout of the file, version 2. Integers are little-endian and unsigned; CRC is the CRC-32 of zlib.

    offset  bytes  what
    0       8      magic: 89 50 47 4f 4c 46 0d 0a
    8       4      version: 2
    12      4      m, bytes of the manifest as stored
    16      4      bytes of the manifest after decompression, at most 256 KiB
    20      4      CRC of bytes 0..19 followed by the stored manifest
    24      m      manifest: JSON in UTF-8, compressed with brotli
    24+m           streams, one after another, to the end of the file; each is
            4          n, bytes of the stream as stored
            4          CRC of those four bytes followed by the stored stream, continued from the CRC before it
            n          the stored stream

Because every CRC continues the one before it, no bit can be flipped and no stream moved, dropped or added unseen.

The manifest is `{"metadata": {...}, "tensors": [...]}`. Each tensor, of at most 1024, is an object with exactly
these members:

    name    1 to 128 characters out of A-Z a-z 0-9 _ . / -, unique in the file
    role    embedding | attention | mlp | control
    shape   list of at most 8 sizes
    bits    2..8: quantised to integers of so many bits, two's complement; 16, 32: IEEE floats of that width
    values  [codec, layout] of the stream of the tensor's values in row-major order
    scale   [codec, layout] of the stream of float16 scales of shape[:-1]; quantised tensors have it, floats do not
    states  quantised tensors only: 0, or 4 or 8 for a trellis of so many states
    order   [codec, layout] of the stream of 2-bit numbers, one a column of each matrix; a trellis has it, nothing else

A quantised weight is worth value * scale of its row; in a trellis, which has 2 or 3 dimensions and at most 65536
columns, (2 * value - q * sign(value)) * scale. q is 0 or 1. To find it, take the columns of a matrix by ascending
order, equals as they come. Each row starts in state 0; a value leads from its state to one of two others, the second
where it is odd; and q follows from the state:

    4 states    next (0,2) (2,0) (1,3) (3,1)                             q 0 0 1 1
    8 states    next (0,2) (5,7) (1,3) (6,4) (2,0) (4,6) (3,1) (7,5)     q 0 1 0 1 0 1 0 1

The stream of a trellis's values holds them as taken, matrix by matrix and row by row, those with q = 0 from its first
value on, those with q = 1 from its last value backwards.

Streams come in the order of the tensors: values, scale, order.
The shape says how many values a stream holds, and bits and layout how many bytes that is, so there are no lengths to
disagree. layout is plain, packed (2..7 bits) or planes (16 and 32 bits), explained in `pgolf/streams.py`; codec is
stored, brotli or zstd (one frame that states its content size). A stream without values is stored and empty. Members,
roles, codecs and layouts that are not named here, numbers that are not finite and anything after the last stream make a
file invalid.
"""

import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf import ops, streams
from pgolf.errors import ArtifactError
from pgolf.files import replacing
from pgolf.manifest import (
    MANIFEST_LIMIT_BYTES,
    ORDER_BITS,
    QUANTISED_BITS,
    ROLES,
    Entry,
    check_description,
    check_metadata,
    check_together,
    order_shape,
    parts_of,
    read_manifest,
)

MAGIC = b"\x89PGOLF\r\n"
VERSION = 2
DEFAULT_LIMIT_BYTES = 160 * 1024**2

_HEADER = struct.Struct("<8sIII")
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")


@dataclass(eq=False)
class StoredTensor:
    """A tensor as it lies in the file.

    Quantised: `values` int8 of `shape`, `scale` float16 of `shape[:-1]`, `bits` 2..8, each value within the signed
    range of `bits`; from a trellis if `states` is 4 or 8, with `order` int8 0..3 of the shape without rows. Float:
    `values` float16 (`bits` 16) or float32 (`bits` 32) of `shape`, `scale` None. All finite.
    """

    name: str
    role: str  # one of ROLES
    shape: tuple[int, ...]
    values: Tensor
    scale: Tensor | None
    bits: int
    order: Tensor | None = None
    states: int = 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, of `shape` and `dtype`, on the device of `values`."""
        if self.scale is None:
            return self.values.to(dtype)
        if not self.values.numel():
            return torch.empty(self.shape, dtype=dtype, device=self.values.device)
        if self.order is not None:
            return ops.trellis_dequantize(self.values, self.scale, self.order, self.states).to(dtype)
        octets = self.values.contiguous().view(torch.uint8).reshape(-1)
        rows = (self.scale.numel(), self.shape[-1])
        return ops.unpack_dequantize(octets, self.scale.reshape(-1), 8, rows, dtype).reshape(self.shape)


@dataclass(frozen=True)
class ByteCount:
    """Where the bytes of a file went. `container` is everything but the stored streams."""

    streams: dict[str, int]  # "<tensor>:values", "<tensor>:scale", "<tensor>:order"
    roles: dict[str, int]  # every one of ROLES
    container: int

    @property
    def total(self) -> int:
        return self.container + sum(self.streams.values())


@dataclass(frozen=True)
class Artifact:
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    bytes: ByteCount


def write_artifact(
    path: str | os.PathLike[str],
    tensors: Iterable[StoredTensor],
    metadata: dict[str, Any],
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    threads: int | None = None,
    codecs: Sequence[str] = tuple(streams.CODECS),
) -> ByteCount:
    """Write `tensors` and `metadata` (a JSON object) to `path`, whole or not at all; equal input makes equal bytes.

    `threads` streams are compressed at a time, by default as many as there are cores, each by whichever of `codecs`
    makes it smallest. A ValueError says what cannot be
    stored: NaN, infinity, a value beyond its bits, a wrong dtype or shape, a name used twice, more than `limit_bytes`
    to decode.
    """
    tensors = list(tensors)
    check_metadata(metadata)
    for tensor in tensors:
        _check_tensor(tensor)
    check_together([(tensor.name, tensor.shape, tensor.bits, tensor.states) for tensor in tensors], limit_bytes)

    parts = [part for tensor in tensors for part in _parts(tensor)]
    largest_first = sorted(range(len(parts)), key=lambda index: -parts[index][0].numel())
    with ThreadPoolExecutor(threads or _cores()) as pool:
        work = {index: pool.submit(streams.encode, *parts[index], codecs) for index in largest_first}
        encoded = [work[index].result() for index in range(len(parts))]
    members = []
    remaining = iter(encoded)
    for tensor in tensors:
        member: dict[str, Any] = {"name": tensor.name, "role": tensor.role, "shape": tensor.shape, "bits": tensor.bits}
        if tensor.scale is not None:
            member["states"] = tensor.states
        for part in parts_of(tensor.bits, tensor.states):
            stream = next(remaining)
            member[part] = [stream.codec, stream.layout]
        members.append(member)
    manifest = {"metadata": metadata, "tensors": members}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MANIFEST_LIMIT_BYTES:
        raise ValueError(f"metadata and tensor names take {len(text)} bytes; at most {MANIFEST_LIMIT_BYTES} fit")

    stored_text = streams.CODECS["brotli"].encode(text)
    header = _HEADER.pack(MAGIC, VERSION, len(stored_text), len(text))
    crc = zlib.crc32(stored_text, zlib.crc32(header))
    with replacing(path) as file:
        file.write(header + _CRC.pack(crc) + stored_text)
        for stream in encoded:
            length = _LENGTH.pack(len(stream.data))
            crc = zlib.crc32(stream.data, zlib.crc32(length, crc))
            file.write(length + _CRC.pack(crc) + stream.data)
    entries = read_manifest(text, limit_bytes)[1]
    return _count_bytes(entries, [len(stream.data) for stream in encoded], len(stored_text))


def read_artifact(path: str | os.PathLike[str], limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Artifact:
    """Read a file that anybody may have made.

    An `ArtifactError` names the file and what is wrong with it. Memory stays within the file's size plus `limit_bytes`:
    a file whose tensors would need more, working copies included, is refused before anything is decoded.
    """
    try:
        return _decode(_read_file(path, limit_bytes), limit_bytes)
    except OSError as error:
        raise ArtifactError(f"{os.fspath(path)!r}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactError(f"{os.fspath(path)!r}: {error}") from None


def _read_file(path: str | os.PathLike[str], limit_bytes: int) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not an ordinary file")
    if status.st_size > limit_bytes:
        raise ValueError(f"is {status.st_size} bytes long; the limit is {limit_bytes}")
    with open(path, "rb") as file:
        return file.read(status.st_size)


def _decode(data: bytes, limit_bytes: int) -> Artifact:
    view = memoryview(data)
    text, crc, offset = _open_manifest(view)
    metadata, entries = read_manifest(text, limit_bytes)
    stored = iter(_split_streams(view[offset:], crc, [stream.label for entry in entries for stream in entry.streams]))
    tensors, lengths = {}, []
    for entry in entries:
        decoded = []
        for stream in entry.streams:
            piece = next(stored)
            lengths.append(len(piece))
            try:
                decoded.append(streams.decode(piece, stream.codec, stream.layout, stream.bits, stream.count))
            except ValueError as error:
                raise ValueError(f"stream {stream.label} {error}") from None
        scale = decoded[1].reshape(entry.shape[:-1]) if len(decoded) > 1 else None
        if entry.states:
            order = (decoded[2] + 2).reshape(order_shape(entry.shape))
            values = ops.trellis_merge(decoded[0], order, entry.states, entry.shape)
        else:
            order, values = None, decoded[0].reshape(entry.shape)
        tensors[entry.name] = StoredTensor(
            entry.name, entry.role, entry.shape, values, scale, entry.bits, order, entry.states
        )
        _check_tensor(tensors[entry.name])
    return Artifact(metadata, tensors, _count_bytes(entries, lengths, offset - _HEADER.size - _CRC.size))


def _open_manifest(view: memoryview) -> tuple[bytes, int, int]:
    """The manifest's text, its checksum, and the offset of the first stream."""
    start = _HEADER.size + _CRC.size
    if view[: len(MAGIC)] != MAGIC:
        raise ValueError("is not a pgolf artifact; the first eight bytes are others")
    if len(view) < start:
        raise ValueError(f"ends within the header, after {len(view)} bytes")
    _, version, stored_length, length = _HEADER.unpack_from(view)
    if version != VERSION:
        raise ValueError(f"is an artifact of version {version}; this build reads version {VERSION}")
    if length > MANIFEST_LIMIT_BYTES:
        raise ValueError(f"manifest of {length} bytes; at most {MANIFEST_LIMIT_BYTES} are accepted")
    stored = view[start : start + stored_length]
    if len(stored) != stored_length:
        raise ValueError("ends within the manifest")
    (crc,) = _CRC.unpack_from(view, _HEADER.size)
    if zlib.crc32(stored, zlib.crc32(view[: _HEADER.size])) != crc:
        raise ValueError("damaged: the checksum of the manifest does not match")
    try:
        return streams.CODECS["brotli"].decode(stored, length), crc, start + stored_length
    except ValueError as error:
        raise ValueError(f"manifest {error}") from None


def _split_streams(view: memoryview, crc: int, labels: list[str]) -> list[memoryview]:
    """The stored streams, all checked before the first is decoded."""
    pieces = []
    offset = 0
    for label in labels:
        start = offset + _LENGTH.size + _CRC.size
        if start > len(view):
            raise ValueError(f"ends before stream {label}")
        (length,) = _LENGTH.unpack_from(view, offset)
        if start + length > len(view):
            raise ValueError(f"ends within stream {label}")
        piece = view[start : start + length]
        crc = zlib.crc32(piece, zlib.crc32(view[offset : offset + _LENGTH.size], crc))
        if _CRC.unpack_from(view, offset + _LENGTH.size) != (crc,):
            raise ValueError(f"damaged: the checksum of stream {label} does not match")
        pieces.append(piece)
        offset = start + length
    if offset != len(view):
        raise ValueError(f"{len(view) - offset} bytes follow the last stream")
    return pieces


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parts(tensor: StoredTensor) -> Iterator[tuple[Tensor, int]]:
    """The arrays of a tensor in the order of its streams, flat and on the CPU, with their bits."""
    if tensor.order is not None:
        order = tensor.order.detach().cpu()
        yield ops.trellis_split(tensor.values.detach().cpu(), order, tensor.states), tensor.bits
    else:
        yield tensor.values.detach().cpu().reshape(-1), tensor.bits
    if tensor.scale is not None:
        yield tensor.scale.detach().cpu().reshape(-1), 16
    if tensor.order is not None:
        yield order.reshape(-1) - 2, ORDER_BITS


def _count_bytes(entries: list[Entry], lengths: list[int], manifest_bytes: int) -> ByteCount:
    found = [stream for entry in entries for stream in entry.streams]
    roles = dict.fromkeys(ROLES, 0)
    for stream, length in zip(found, lengths, strict=True):
        roles[stream.role] += length
    container = _HEADER.size + _CRC.size + manifest_bytes + len(found) * (_LENGTH.size + _CRC.size)
    return ByteCount({stream.label: length for stream, length in zip(found, lengths, strict=True)}, roles, container)


def _check_tensor(tensor: StoredTensor) -> None:
    check_description(tensor.name, tensor.role, tensor.shape, tensor.bits, tensor.states)
    values, scale, quantised = tensor.values, tensor.scale, tensor.bits in QUANTISED_BITS
    expected: list[tuple[Any, tuple[int, ...], torch.dtype, str]]
    expected = [(values, tensor.shape, streams.dtype_of(tensor.bits), "values")]
    if quantised:
        expected.append((scale, tensor.shape[:-1], torch.float16, "scale"))
    elif scale is not None:
        raise ValueError(f"tensor {tensor.name}: a float tensor has no scale")
    if tensor.states:
        expected.append((tensor.order, order_shape(tensor.shape), torch.int8, "order"))
    elif tensor.order is not None:
        raise ValueError(f"tensor {tensor.name}: only a trellis has an order")
    for part, shape, dtype, what in expected:
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
            came = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"tensor {tensor.name}: {what} must be {dtype} of shape {shape}, not {came}")
        if not part.numel():
            continue
        lowest, highest = (each.item() for each in torch.aminmax(part))  # NaN wins in both, and nothing is copied
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(f"tensor {tensor.name}: {what} must be finite")
        if what == "order" and not 0 <= lowest <= highest < 1 << ORDER_BITS:
            raise ValueError(f"tensor {tensor.name}: order lies in {lowest}..{highest}, accepted are 0 to 3")
        bound = 1 << (tensor.bits - 1)
        if what == "values" and dtype == torch.int8 and not (-bound <= lowest and highest < bound):
            raise ValueError(
                f"tensor {tensor.name}: values lie in {lowest}..{highest}, "
                f"{tensor.bits} bits hold {-bound}..{bound - 1}"
            )
