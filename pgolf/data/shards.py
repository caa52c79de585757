"""Token shards in the community's format.

A shard `*.bin` is a header of 256 little-endian int32 (1024 bytes), then `n` tokens as little-endian uint16:

    header[0] = 20240520    magic number
    header[1] = 1           version
    header[2] = n           number of tokens
    header[3:] = 0

so the file is exactly `1024 + 2 * n` bytes long. Byte sidecars (`*_val_bytes_*.bin`) have the same format; their values
are the UTF-8 bytes of the original text that each validation token stands for.
Source: `load_data_shard` in the root `train_gpt.py` of openai/parameter-golf.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.errors import DataError
from pgolf.runtime.files import file_bytes, replacing

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN_BYTES = 2
MAX_TOKEN = 65535
TOKENS_PER_SHARD = 100_000_000
SPLITS = ("train", "val")

_HEADER_TYPE = np.dtype("<i4")
_TOKEN_TYPE = np.dtype("<u2")


def write_shard(path: str | os.PathLike[str], tokens: Any) -> None:
    """Write `tokens` (1-D integers, 0 to 65535) as one shard; the file appears whole or not at all.

    `DataError` for values that uint16 cannot hold, values that are not integers, or more than 2**31 - 1 of them.
    """
    array = np.asarray(tokens)
    if array.size == 0:
        array = array.astype(_TOKEN_TYPE)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{path}: tokens must be a 1-D integer array, not {array.ndim}-D {array.dtype}")
    if array.size > np.iinfo(_HEADER_TYPE).max:
        raise DataError(f"{path}: {array.size} tokens do not fit one shard (at most {np.iinfo(_HEADER_TYPE).max})")
    if array.size and array.dtype != _TOKEN_TYPE:
        outside = np.flatnonzero((array < 0) | (array > MAX_TOKEN))
        if outside.size:
            first = int(outside[0])
            raise DataError(f"{path}: token {int(array[first])} at index {first} is outside 0..{MAX_TOKEN}")
    header = np.zeros(HEADER_BYTES // _HEADER_TYPE.itemsize, dtype=_HEADER_TYPE)
    header[:3] = MAGIC, VERSION, array.size
    with replacing(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(array, dtype=_TOKEN_TYPE).data)


def read_token_count(path: str | os.PathLike[str]) -> int:
    """Number of tokens in the shard at `path`, after checking its header and the length of the file."""
    try:
        size = file_bytes(path)
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from None
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: header ends at byte {len(raw)}; a shard begins with {HEADER_BYTES} bytes of header")
    magic, version, count = (int(value) for value in np.frombuffer(raw, dtype=_HEADER_TYPE, count=3))
    if magic != MAGIC:
        raise DataError(f"{path}: byte 0: magic number {magic}, a token shard has {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: byte 4: version {version}, only version {VERSION} is read")
    if count < 0:
        raise DataError(f"{path}: byte 8: {count} tokens, the count must be 0 or more")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if size != expected:
        raise DataError(f"{path}: byte 8: {count} tokens make a file of {expected} bytes, this one has {size}")
    return count


def read_shard(path: str | os.PathLike[str]) -> np.ndarray:
    """The tokens of the shard at `path`: read-only uint16 (n,), memory-mapped.

    `DataError` names the file, the byte offset, what stands there and what is accepted.
    """
    count = read_token_count(path)
    if count == 0:  # an empty range cannot be mapped
        empty = np.zeros(0, dtype=_TOKEN_TYPE)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype=_TOKEN_TYPE, mode="r", offset=HEADER_BYTES, shape=(count,))


def find_shards(folder: str | os.PathLike[str], split: str) -> list[Path]:
    """The shards of one split ("train" or "val") in `folder`, in name order; never byte sidecars. May be empty."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    return sorted(path for path in _files(folder, f"*_{split}_*.bin") if "_bytes_" not in path.name)


def find_sidecars(folder: str | os.PathLike[str]) -> list[Path]:
    """The byte sidecars of the validation shards in `folder`, in name order. May be empty."""
    return sorted(_files(folder, "*_val_bytes_*.bin"))


def _files(folder: str | os.PathLike[str], pattern: str) -> list[Path]:
    folder = Path(folder)
    if not os.path.isdir(folder):  # which, unlike Path's, refuses no name
        raise DataError(f"no data folder {folder}; `pgolf data demo` makes one, `pgolf data download` fetches FineWeb")
    return [path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")]
