"""Entropy coding of quantised weights, trellis indices and small floats: arrays in, one blob of bytes out, and back.

Integer arithmetic only: the same values make the same bytes on every machine, with any number of threads and in every
build.

Format, version 1. A number is unsigned, in base 128 with the lowest digit first, 128 added to every digit but the last;
at most 5 digits. Other integers are little-endian.

    byte         version: 1
    byte         0 mix, 1 static, 2 floats; plus 128 if the blob is a list
    byte         states of the trellis: 0, 4 or 8
    number       tensors, at most 4096; exactly 1 unless the blob is a list
    per tensor   byte: dimensions (integers at most 3, floats at most 8); that many numbers: its shape; then for
                 integers two signed bytes, the least and the greatest value, 0 and 0 where there is none; for floats a
                 byte, 2 or 4: the size of a value
    numbers      the length of every strip's payload
    payloads

All values together take at most 2^28 bytes. Integer tensors are banks of matrices, of shape (count, rows, cols) with
ones for missing dimensions, and are cut into planes: every matrix one; or, if it has fewer than 1024 values, the whole
bank; a matrix of more than 65536 columns (not with a trellis) is read as one long row cut to rows of 65536, the last
one shorter; planes of more than 2^22 values are cut after as many whole rows as fit. Tensors whose least and greatest
value are equal have no planes. A strip ends with the plane that brings it to 2^22 values. Strips are independent of
each other. Floats are one strip, if there are any.

So that decoding takes time in proportion to the bytes, zeros fill a payload up: a static one of n values to
(n - 65536) / 64 bytes, a stream of n binary decisions to (n - 2^14) / 32, floats' to (n - 2^20) / 32.

Binary arithmetic coding (mix, floats, static's tables): `csrc/coder/range_coder.h`. A 32-bit range starts at 2^32 - 1;
a 1 of probability p / 65536 takes the lower (range >> 16) · p of it; below 2^24 it is shifted up by 8 bits. Up to four
zeros at the end are left out. Mix: one stream a strip, the model in `csrc/coder/mix_model.h` and `csrc/coder/mixer.h`,
its tables in `csrc/coder/logistic.cpp`; floats: `csrc/coder/float_coder.cpp`. Static: three bytes with the length of
the coded tables, these (each frequency's length in bits in an adaptive tree of 4 bits, then its bits; frequencies of
one tensor add up to 2^14; with a trellis a table for each quantiser), then eight states of 4 bytes that take turns from
the first value of every plane, and 2-byte words that refill a state when it falls below 2^16; all states end at 2^16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pgolf.errors import ArtifactError
from pgolf.ops import backends
from pgolf.runtime.host import cores

MODES = ("mix", "static")
TRELLIS_STATES = (0, 4, 8)
LIMIT_BYTES = 1 << 28
MOST_TENSORS = 4096
MOST_TRELLIS_COLUMNS = 1 << 16

Array = npt.NDArray[Any]
ArrayLike = Array | torch.Tensor


@dataclass(frozen=True)
class Description:
    """What a blob holds, as `describe` reads it from its head.

    Attributes:
        mode: "mix", "static" or "floats".
        trellis_states: 0, 4 or 8.
        is_list: whether a list was encoded.
        tensors: of each, its shape, as (rows, cols), and the bytes of a value.
    Raises:
        Nothing.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> coder.describe(coder.encode(np.zeros((4, 6), np.int8), mode="static")).tensors
        [((4, 6), 1)]

    Source: the format is this package's own, told in pgolf/artifact/coder.py.
    """

    mode: str  # mix | static | floats
    trellis_states: int
    is_list: bool
    tensors: list[tuple[tuple[int, ...], int]]  # shape, bytes of a value


def encode(
    values: ArrayLike | Sequence[ArrayLike], mode: str = "mix", trellis_states: int = 0, threads: int | None = None
) -> bytes:
    """Entropy-code int8 arrays into one blob of bytes.

    "mix" estimates every binary decision of a value by mixing adaptive counters of several contexts (scale of the row
    and the column so far, neighbours, the matrix before in a bank, the most similar earlier row, the trellis quantiser)
    with rounded Gaussians: about Σ -log2 p(value) bits. "static" is a table of frequencies for each tensor and
    asymmetric numeral systems: a little larger, and thirty times as fast.

    Args:
        values: an int8 array or tensor (rows, cols), (count, rows, cols) for a bank, or of fewer dimensions; or a list
            of them, of which later ones profit from what was learned from earlier ones. At most 2^28 bytes in all.
        mode: "mix" (and "static" where that is smaller, as for few or nearly uniform values) or "static" alone.
        trellis_states: 0; or 4 or 8 where values are indices of `ops.trellis_quantize`, their columns as the machine
            takes them.
        threads: at most so many; by default one a core. The bytes do not depend on it.
    Returns:
        bytes, for `decode`.
    Raises:
        TypeError: what is not int8.
        ValueError: a mode or number of states that is not accepted; too many dimensions, tensors, columns or bytes.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> values = np.arange(24, dtype=np.int8).reshape(4, 6)
        >>> blob = coder.encode(values)
        >>> bool((coder.decode(blob) == values).all()), coder.describe(blob).trellis_states
        (True, 0)

    Sources: context mixing, Mahoney's PAQ; asymmetric numeral systems, Duda, arXiv 1311.2540.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is not accepted; accepted are {' and '.join(MODES)}")
    if trellis_states not in TRELLIS_STATES:
        raise ValueError(f"trellis_states: {trellis_states!r} is not accepted; accepted are 0, 4 and 8")
    arrays, is_list = _arrays(values, {np.dtype(np.int8)}, 3)
    if trellis_states and any(array.shape[-1:] > (MOST_TRELLIS_COLUMNS,) for array in arrays):
        raise ValueError(f"values: rows of more than {MOST_TRELLIS_COLUMNS} values are not accepted with a trellis")
    tensors = [(array.shape, *_bounds(array)) for array in arrays]
    flat = arrays[0].reshape(-1) if len(arrays) == 1 else np.concatenate([np.empty(0, np.int8), *map(np.ravel, arrays)])
    native, threads = backends.native(), threads or cores()
    blob: bytes = native.encode_ints(flat.ctypes.data, tensors, is_list, True, trellis_states, threads)
    if mode == "static":
        return blob
    mixed: bytes = native.encode_ints(flat.ctypes.data, tensors, is_list, False, trellis_states, threads)
    return min(mixed, blob, key=len)


def decode(
    blob: bytes | bytearray | memoryview, threads: int | None = None, limit_bytes: int = LIMIT_BYTES
) -> Array | list[Array]:
    """What `encode` was given, as numpy arrays. The blob can come from anybody.

    Args:
        blob: bytes, of `encode`.
        threads: at most so many; by default one a core.
        limit_bytes: a blob that holds more bytes of values is refused before they are allocated.
    Returns:
        An int8 array of the shape given, as (rows, cols), or a list of arrays where a list was encoded.
    Raises:
        ArtifactError: a blob that is malformed, holds floats or too much; one line says which.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> one, other = coder.decode(coder.encode([np.zeros((2, 3), np.int8), np.ones(5, np.int8)]))
        >>> one.shape, other.shape, other.dtype.name
        ((2, 3), (5,), 'int8')

    Source: as for `encode`; the format is told in pgolf/artifact/coder.py.
    """
    return _decode(blob, False, threads, limit_bytes)


def encode_floats(values: ArrayLike | Sequence[ArrayLike]) -> bytes:
    """Entropy-code float16 and float32 arrays into one blob of bytes, every bit pattern kept: scales, gains, norms.

    Args:
        values: a float16 or float32 array or tensor of at most 8 dimensions, (), (rows, cols), ...; or a list of them,
            best all small ones in one call. At most 2^28 bytes in all.
    Returns:
        bytes, for `decode_floats`.
    Raises:
        TypeError: what is neither float16 nor float32.
        ValueError: too many dimensions, tensors or bytes.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> scales, gain = coder.decode_floats(coder.encode_floats([np.ones((2, 3), np.float16), np.float32([0.1])]))
        >>> scales.dtype.name, scales.shape, gain.dtype.name
        ('float16', (2, 3), 'float32')

    Source: context mixing as for `encode`, over the bits of a float.
    """
    arrays, is_list = _arrays(values, {np.dtype(np.float16), np.dtype(np.float32)}, 8)
    tensors = [(array.shape, array.itemsize) for array in arrays]
    data = b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)
    flat = np.frombuffer(data, np.uint8)
    blob: bytes = backends.native().encode_floats(flat.ctypes.data, tensors, is_list)
    return blob


def decode_floats(blob: bytes | bytearray | memoryview, limit_bytes: int = LIMIT_BYTES) -> Array | list[Array]:
    """What `encode_floats` was given, as numpy arrays. The blob can come from anybody.

    Args:
        blob: bytes, of `encode_floats`.
        limit_bytes: a blob that holds more bytes of values is refused before they are allocated.
    Returns:
        An array of the dtype and shape given, as (rows, cols), or a list of arrays where a list was encoded.
    Raises:
        ArtifactError: a blob that is malformed, holds integers or too much; one line says which.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> coder.decode_floats(coder.encode_floats(np.zeros((2, 3), np.float32))).shape
        (2, 3)

    Source: as for `encode_floats`; the format is told in pgolf/artifact/coder.py.
    """
    return _decode(blob, True, 1, limit_bytes)


def describe(blob: bytes | bytearray | memoryview) -> Description:
    """What a blob says that it holds, without decoding it.

    Args:
        blob: bytes, of `encode` or `encode_floats`.
    Returns:
        A `Description`: mode, trellis states, and the shape of each tensor, as (rows, cols).
    Raises:
        ArtifactError: a blob whose head is malformed.
    Example:
        >>> import numpy as np
        >>> from pgolf.artifact import coder
        >>> coder.describe(coder.encode_floats([np.ones((2, 3), np.float16)])).tensors
        [((2, 3), 2)]

    Source: the format is this package's own, told in pgolf/artifact/coder.py.
    """
    native = backends.native()
    data = np.frombuffer(blob, np.uint8)
    if not data.size:
        raise ArtifactError("coded blob: is empty")
    try:
        kind, states, is_list, tensors = native.read_blob(data.ctypes.data, data.size)
    except ValueError as error:
        raise ArtifactError(f"coded blob: {error}") from None
    return Description((*MODES, "floats")[kind], states, is_list, [(tuple(shape), size) for shape, size in tensors])


def _decode(
    blob: bytes | bytearray | memoryview, floats: bool, threads: int | None, limit_bytes: int
) -> Array | list[Array]:
    held = describe(blob)
    if (held.mode == "floats") != floats:
        raise ArtifactError(f"coded blob: holds {'integers' if floats else 'floats'}")
    sizes = [itemsize * math.prod(shape) for shape, itemsize in held.tensors]
    if sum(sizes) > limit_bytes:
        raise ArtifactError(f"coded blob: holds {sum(sizes)} bytes of values; the limit is {limit_bytes}")
    values, data = np.empty(sum(sizes), np.uint8), np.frombuffer(blob, np.uint8)
    try:
        native = backends.native()
        native.decode_blob(data.ctypes.data, data.size, values.ctypes.data, values.size, threads or cores())
    except ValueError as error:
        raise ArtifactError(f"coded blob: {error}") from None
    arrays: list[Array] = []
    ends = np.cumsum(sizes, dtype=np.int64)
    for (shape, itemsize), size, end in zip(held.tensors, sizes, ends, strict=True):
        dtype = np.dtype({1: "i1", 2: "<f2", 4: "<f4"}[itemsize])
        arrays.append(values[end - size : end].view(dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape))
    return arrays if held.is_list else arrays[0]


def _arrays(
    values: ArrayLike | Sequence[ArrayLike], dtypes: set[np.dtype[Any]], most_dims: int
) -> tuple[list[Array], bool]:
    """`values` as contiguous arrays on the CPU, and whether it was a list."""
    is_list = not isinstance(values, np.ndarray | torch.Tensor)
    given = list(values) if is_list else [values]
    if len(given) > MOST_TENSORS:
        raise ValueError(f"values: {len(given)} tensors; at most {MOST_TENSORS} are accepted")
    arrays = []
    for each in given:
        array = each.detach().cpu().numpy() if isinstance(each, torch.Tensor) else each
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("=") not in dtypes:
            found = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"values: expected {' or '.join(sorted(map(str, dtypes)))}, got {found}")
        if array.ndim > most_dims:
            raise ValueError(f"values: {array.ndim} dimensions; at most {most_dims} are accepted")
        arrays.append(np.ascontiguousarray(array).reshape(array.shape))
    total = sum(array.nbytes for array in arrays)
    if total > LIMIT_BYTES:
        raise ValueError(f"values: {total} bytes; at most {LIMIT_BYTES} are accepted")
    return arrays, is_list


def _bounds(array: Array) -> tuple[int, int]:
    return (int(array.min()), int(array.max())) if array.size else (0, 0)
