"""One array as one compressed byte string, and back.

A stream holds `count` values of `bits` bits: int8 for 2..8 bits, float16 for 16, float32 for 32. It is made in two
steps:

    layout   plain    one little-endian number after another; an int8 for every value of 8 bits or fewer
             packed   2..7 bits: value i in bits [i*bits, (i+1)*bits) of the string, least significant bit first, zeros
                      to the end of the last byte
             planes   16 and 32 bits: the lowest byte of every value, then the next byte of every value, and so on
    codec    stored | brotli | zstd

`encode` keeps the smallest. Up to `SAMPLE_VALUES` values it tries every pair of layout and codec. Beyond, it tries them
on a run of `SAMPLE_VALUES` from the middle and encodes in full those within `SAMPLE_MARGIN` of the best there. brotli
and zstandard let go of Python's lock, so threads can encode several streams at once.

Errors: what does not decode to exactly `count` values is a ValueError, found without allocating more than those values
and one copy of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import brotli
import numpy as np
import torch
import zstandard
from torch import Tensor

from pgolf import ops

SAMPLE_VALUES = 1 << 17
SAMPLE_MARGIN = 1.002
BROTLI_WINDOW_BITS = (10, 24)  # what the format allows
ZSTD_SMALLEST_WINDOW = 1024  # bytes


@dataclass(frozen=True)
class Codec:
    encode: Callable[[bytes], bytes]
    decode: Callable[[memoryview, int], bytes]  # (stored bytes, raw length): ValueError unless it is exactly that long


def _stored_decode(data: memoryview, length: int) -> bytes:
    if len(data) != length:
        raise ValueError(f"holds {len(data)} bytes instead of {length}")
    return bytes(data)


def _brotli_encode(raw: bytes) -> bytes:
    smallest, largest = BROTLI_WINDOW_BITS
    window_bits = min(max((len(raw) + 16).bit_length(), smallest), largest)  # the format keeps 16 bytes of the window
    return brotli.compress(raw, quality=11, lgwin=window_bits)


def _brotli_decode(data: memoryview, length: int) -> bytes:
    decoder = brotli.Decompressor()
    try:
        raw = decoder.process(data, output_buffer_limit=length + 1)  # one byte of room, so that the end can be seen
    except brotli.error:
        raise ValueError("is not a brotli stream") from None
    if len(raw) != length or not decoder.is_finished():
        raise ValueError(f"does not decode to {length} bytes")
    return raw


def _zstd_encode(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=22, write_checksum=False).compress(raw)


def _zstd_decode(data: memoryview, length: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != length:
            raise ValueError(f"does not decode to {length} bytes")
        window = max(2 * length, ZSTD_SMALLEST_WINDOW)
        if frame.window_size > window:
            raise ValueError(f"asks for a window of {frame.window_size} bytes for {length} bytes of data")
        decoder = zstandard.ZstdDecompressor(max_window_size=window)
        raw = decoder.decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError:
        raise ValueError("is not one whole zstandard frame") from None
    if len(raw) != length:
        raise ValueError(f"does not decode to {length} bytes")
    return raw


CODECS = {
    "stored": Codec(encode=lambda raw: raw, decode=_stored_decode),
    "brotli": Codec(encode=_brotli_encode, decode=_brotli_decode),
    "zstd": Codec(encode=_zstd_encode, decode=_zstd_decode),
}


def dtype_of(bits: int) -> torch.dtype:
    return {16: torch.float16, 32: torch.float32}.get(bits, torch.int8)


def layouts_of(bits: int) -> tuple[str, ...]:
    if bits == 8:
        return ("plain",)
    return ("plain", "packed") if bits < 8 else ("plain", "planes")


def raw_length(count: int, bits: int, layout: str) -> int:
    """Bytes of `count` values before compression."""
    if layout == "packed":
        return (count * bits + 7) // 8
    return count * (max(bits, 8) // 8)


@dataclass(frozen=True)
class Encoded:
    codec: str
    layout: str
    data: bytes


def encode(values: Tensor, bits: int, codecs: Sequence[str] = tuple(CODECS)) -> Encoded:
    """The smallest encoding of `values` (1-D, `dtype_of(bits)`, on the CPU); the same one for the same values."""
    pairs = [(codec, layout) for layout in layouts_of(bits) for codec in codecs]
    if not values.numel():
        pairs = [("stored", "plain")]
    elif values.numel() > SAMPLE_VALUES:
        start = (values.numel() - SAMPLE_VALUES) // 2
        sample = values[start : start + SAMPLE_VALUES]
        tried = [len(_encode_as(sample, bits, codec, layout).data) for codec, layout in pairs]
        pairs = [pair for pair, size in zip(pairs, tried, strict=True) if size <= min(tried) * SAMPLE_MARGIN]
    return min((_encode_as(values, bits, codec, layout) for codec, layout in pairs), key=lambda each: len(each.data))


def decode(data: memoryview, codec: str, layout: str, bits: int, count: int) -> Tensor:
    """The `count` values of a stream, 1-D of `dtype_of(bits)`; ValueError if `data` does not hold exactly that many."""
    length = raw_length(count, bits, layout)
    if not length and codec != "stored":
        raise ValueError(f"holds no values, yet is compressed with {codec}")
    raw = CODECS[codec].decode(data, length)
    if not count:
        return torch.empty(0, dtype=dtype_of(bits))
    if layout == "packed":
        return ops.unpack_bits(torch.from_numpy(np.frombuffer(raw, np.uint8).copy()), bits, count)
    octets = np.frombuffer(raw, np.uint8)
    if layout == "planes":
        octets = octets.reshape(bits // 8, count).T
    octets = octets.flatten()
    return torch.from_numpy(octets.view(_numpy_dtype(bits)).astype(_numpy_dtype(bits).newbyteorder("="), copy=False))


def _encode_as(values: Tensor, bits: int, codec: str, layout: str) -> Encoded:
    if layout == "packed":
        raw = ops.pack_bits(values, bits).numpy().tobytes()
    else:
        array = values.numpy().astype(_numpy_dtype(bits), copy=False)
        if layout == "planes":
            array = array.view(np.uint8).reshape(-1, bits // 8).T
        raw = array.tobytes()
    return Encoded(codec, layout, CODECS[codec].encode(raw))


def _numpy_dtype(bits: int) -> np.dtype:
    return np.dtype({16: "<f2", 32: "<f4"}.get(bits, "i1"))
