"""The artifact: one file `*.pgolf` that holds a model's tensors in as few bytes as the coder allows. No pickle.

Layout of the file, version 3. Integers are little-endian and unsigned; CRC is the CRC-32 of zlib.

    offset  bytes  what
    0       8      magic: 89 50 47 4f 4c 46 0d 0a
    8       4      version: 3
    12      4      m, bytes of the manifest as stored
    16      4      bytes of the manifest after decompression, at most 256 KiB
    20      4      CRC of bytes 0..19 followed by the stored manifest
    24      m      manifest: JSON in UTF-8, compressed with brotli
    24+m           streams, one after another, to the end of the file; each is
            4          n, bytes of the stream
            4          CRC of those four bytes followed by the stream, continued from the CRC before it
            n          the stream: a blob of `pgolf.artifact.coder`, whose format is told there

Because every CRC continues the one before it, no bit can be flipped and no stream moved, dropped or added unseen.

What the manifest says and which streams follow is told in `pgolf/artifact/manifest.py`. Versions 1 and 2 are not read.
"""

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgolf.artifact import streams
from pgolf.artifact.manifest import (
    MANIFEST_LIMIT_BYTES,
    QUANTIZED_BITS,
    ROLES,
    Entry,
    Stream,
    check_metadata,
    check_together,
    read_manifest,
    streams_of,
)
from pgolf.artifact.stored_tensor import StoredTensor, check_tensor
from pgolf.errors import ArtifactError, imported
from pgolf.runtime.files import replacing
from pgolf.runtime.host import cores

MAGIC = b"\x89PGOLF\r\n"
VERSION = 3
DEFAULT_LIMIT_BYTES = 160 * 1024**2

_HEADER = struct.Struct("<8sIII")
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
_FIRST = _HEADER.size + _CRC.size  # where the manifest begins


@dataclass(frozen=True)
class ByteCount:
    """Where the bytes of a file went.

    Attributes:
        streams: bytes by stream: "<tensor>:values", "<role>:scales", "<role>:orders", "<role>:floats".
        roles: bytes by role, every one of "embedding", "attention", "mlp" and "control".
        container: bytes of everything but the streams. `total` is the file's size.
    Raises:
        Nothing.
    Example:
        >>> from pgolf.artifact.file import write_artifact
        >>> count = write_artifact("empty.pgolf", [], {})
        >>> count.total == count.container
        True

    Source: this package.
    """

    streams: dict[str, int]  # "<tensor>:values", "<role>:scales", "<role>:orders", "<role>:floats"
    roles: dict[str, int]  # every one of ROLES
    container: int

    @property
    def total(self) -> int:
        return self.container + sum(self.streams.values())


@dataclass(frozen=True)
class Artifact:
    """The contents of a file, as `read_artifact` returns them.

    Attributes:
        metadata: the JSON object that was written.
        tensors: `StoredTensor` by name, in the order written, of any shapes, as (rows, columns).
        bytes: a `ByteCount` of the file.
    Raises:
        Nothing.
    Example:
        >>> from pgolf.artifact.file import read_artifact, write_artifact
        >>> _ = write_artifact("empty.pgolf", [], {"note": "nothing yet"})
        >>> read_artifact("empty.pgolf").metadata
        {'note': 'nothing yet'}

    Source: this package; the format is told in pgolf/artifact/file.py and pgolf/artifact/manifest.py.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    bytes: ByteCount


def write_artifact(
    path: str | os.PathLike[str],
    tensors: Iterable[StoredTensor],
    metadata: dict[str, Any],
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    threads: int | None = None,
    mode: str = "mix",
) -> ByteCount:
    """Write tensors and metadata as one `.pgolf` file, whole or not at all; equal input makes equal bytes.

    Args:
        path: of the file; an old one is replaced once the new one is complete.
        tensors: `StoredTensor`s of any shapes, as (rows, columns), at most 1024.
        metadata: a JSON object of plain, finite, shallow values.
        limit_bytes: of memory that reading may need; more is refused here already.
        threads: work at a time, by default as many as there are cores.
        mode: of the coder: "mix" (small) or "static" (fast).
    Returns:
        A `ByteCount` of the file.
    Raises:
        ValueError: what cannot be stored: NaN, infinity, a value beyond its bits, a wrong dtype or shape, a name used
            twice, more than limit_bytes to decode. The tensor is named.
        OSError: a path that cannot be written.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> from pgolf.artifact.file import StoredTensor, write_artifact
        >>> values, scale = ops.gptq(torch.randn(8, 16), torch.eye(16), bits=6)
        >>> count = write_artifact("model.pgolf", [StoredTensor("up", "mlp", (8, 16), values, scale, 6)], {})
        >>> sorted(count.streams)
        ['mlp:scales', 'up:values']

    Source: this package; the format is told in pgolf/artifact/file.py and pgolf/artifact/manifest.py.
    """
    tensors = list(tensors)
    check_metadata(metadata)
    for tensor in tensors:
        check_tensor(tensor)
    entries = [Entry(each.name, each.role, tuple(each.shape), each.bits, each.states) for each in tensors]
    check_together(entries, limit_bytes)
    text = _manifest_text(entries, metadata)
    found = streams_of(entries)
    threads = threads or cores()

    def encode(stream: Stream) -> bytes:
        members = [tensors[i] for i in stream.members]
        arrays = streams.gather(
            stream, [_part(each, stream.part) for each in members], [_order(each) for each in members]
        )
        return streams.encode(stream, arrays, members[0].states, mode, threads)

    largest_first = sorted(range(len(found)), key=lambda index: -found[index].decoded_bytes)
    with ThreadPoolExecutor(threads) as pool:
        work = {index: pool.submit(encode, found[index]) for index in largest_first}
        blobs = [work[index].result() for index in range(len(found))]

    stored_text = _compress(text)
    header = _HEADER.pack(MAGIC, VERSION, len(stored_text), len(text))
    crc = zlib.crc32(stored_text, zlib.crc32(header))
    with replacing(path) as file:
        file.write(header + _CRC.pack(crc) + stored_text)
        for blob in blobs:
            length = _LENGTH.pack(len(blob))
            crc = zlib.crc32(blob, zlib.crc32(length, crc))
            file.write(length + _CRC.pack(crc) + blob)
    return _count_bytes(found, [len(blob) for blob in blobs], len(stored_text))


def read_artifact(path: str | os.PathLike[str], limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Artifact:
    """Read a `.pgolf` file that anybody may have made. Nothing in it is executed.

    Args:
        path: of the file.
        limit_bytes: of memory beside the file's size: a file whose tensors would need more, working copies included, is
            refused before anything is decoded.
    Returns:
        An `Artifact`: metadata, tensors by name with their shapes, as (rows, columns), and where the bytes went.
    Raises:
        ArtifactError: a file that cannot be read, is damaged, hostile, too large or of another version; one line names
            the file and what is wrong with it.
    Example:
        >>> import torch
        >>> from pgolf.artifact.file import StoredTensor, read_artifact, write_artifact
        >>> _ = write_artifact("model.pgolf", [StoredTensor("gain", "control", (4,), torch.ones(4), None, 32)], {})
        >>> read_artifact("model.pgolf").tensors["gain"].dequantize().shape
        torch.Size([4])

    Source: this package; the format is told in pgolf/artifact/file.py and pgolf/artifact/manifest.py.
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
    found = streams_of(entries)
    blobs = _split_streams(view[offset:], crc, [stream.label for stream in found])
    parts: dict[tuple[int, str], Tensor] = {}
    for stream, arrays in zip(found, _decode_streams(found, blobs), strict=True):
        members = [entries[i] for i in stream.members]
        for i, part in zip(stream.members, streams.scatter(stream, arrays, members), strict=True):
            parts[i, stream.part] = part
    tensors = {}
    for i, entry in enumerate(entries):
        tensors[entry.name] = _tensor_of(entry, *(parts.pop((i, part), None) for part in _PARTS))
    return Artifact(metadata, tensors, _count_bytes(found, [len(blob) for blob in blobs], offset - _FIRST))


_PARTS = ("values", "floats", "scales", "orders")


def _tensor_of(
    entry: Entry, values: Tensor | None, floats: Tensor | None, scale: Tensor | None, order: Tensor | None
) -> StoredTensor:
    values = floats if values is None else values
    assert values is not None
    tensor = StoredTensor(entry.name, entry.role, entry.shape, values, scale, entry.bits, order, entry.states)
    check_tensor(tensor)
    if order is not None:
        tensor.values = streams.out_of_order(values, order)
    return tensor


def _decode_streams(found: list[Stream], blobs: list[memoryview]) -> list[list[Tensor]]:
    threads = cores()

    def decode(stream: Stream, blob: memoryview) -> list[Tensor]:
        try:
            return streams.decode(stream, blob, threads)
        except ValueError as error:
            raise ValueError(f"stream {stream.label} {str(error).removeprefix('coded blob: ')}") from None

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(decode, found, blobs))


def _open_manifest(view: memoryview) -> tuple[bytes, int, int]:
    """The manifest's text, its checksum, and the offset of the first stream."""
    start = _FIRST
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
    return _decompress(stored, length), crc, start + stored_length


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


def _part(tensor: StoredTensor, part: str) -> Tensor:
    """A tensor's contribution to a stream, on the CPU."""
    found = {"scales": tensor.scale, "orders": tensor.order}.get(part, tensor.values)
    assert found is not None
    return found.detach().cpu()


def _order(tensor: StoredTensor) -> Tensor | None:
    return None if tensor.order is None else tensor.order.detach().cpu()


def _manifest_text(entries: list[Entry], metadata: dict[str, Any]) -> bytes:
    members = []
    for entry in entries:
        member = {"name": entry.name, "role": entry.role, "shape": entry.shape, "bits": entry.bits}
        members.append({**member, "states": entry.states} if entry.bits in QUANTIZED_BITS else member)
    manifest = {"metadata": metadata, "tensors": members}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MANIFEST_LIMIT_BYTES:
        raise ValueError(f"metadata and tensor names take {len(text)} bytes; at most {MANIFEST_LIMIT_BYTES} fit")
    return text


def _compress(text: bytes) -> bytes:
    brotli = imported("brotli", "the artifact's manifest")
    return bytes(brotli.compress(text, quality=11, lgwin=18))  # a window of MANIFEST_LIMIT_BYTES


def _decompress(data: memoryview, length: int) -> bytes:
    brotli = imported("brotli", "the artifact's manifest")
    decoder = brotli.Decompressor()
    try:
        text: bytes = decoder.process(data, output_buffer_limit=length + 1)  # a byte of room, to see the end
    except brotli.error:
        raise ValueError("manifest is not a brotli stream") from None
    if len(text) != length or not decoder.is_finished():
        raise ValueError(f"manifest does not decode to {length} bytes")
    return text


def _count_bytes(found: list[Stream], lengths: list[int], manifest_bytes: int) -> ByteCount:
    roles = dict.fromkeys(ROLES, 0)
    for stream, length in zip(found, lengths, strict=True):
        roles[stream.role] += length
    container = _FIRST + manifest_bytes + len(found) * (_LENGTH.size + _CRC.size)
    return ByteCount({stream.label: length for stream, length in zip(found, lengths, strict=True)}, roles, container)
