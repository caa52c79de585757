"""The manifest of an artifact: what the file says it holds.

Written by whoever made the file, so every type, size and name is checked here before anything is allocated for it; what
is wrong is a ValueError of one line. The writer passes through the same checks.

The manifest is `{"metadata": {...}, "tensors": [...]}`. Each tensor, of at most 1024, is an object with exactly
these members:

    name    1 to 128 characters out of A-Z a-z 0-9 _ . / -, unique in the file
    role    embedding | attention | mlp | control
    shape   list of at most 8 sizes
    bits    2..8: quantised to integers of so many bits, two's complement; 16, 32: IEEE floats of that width
    states  quantised tensors only: 0, or 4 or 8 for a trellis of so many states

A quantised tensor has values of its shape and float16 scales of shape[:-1]; a trellis has 2 or 3 dimensions, at most
65536 columns, and an order of its shape without rows: a number 0..3 for each column of each matrix. A weight is worth
value * scale of its row; in a trellis (2 * value - q * sign(value)) * scale. q is 0 or 1. To find it, take the columns
of a matrix by ascending order, equals as they come. Each row starts in state 0; a value leads from its state to one of
two others, the second where it is odd; and q follows from the state:

    4 states    next (0,2) (2,0) (1,3) (3,1)                             q 0 0 1 1
    8 states    next (0,2) (5,7) (1,3) (6,4) (2,0) (4,6) (3,1) (7,5)     q 0 1 0 1 0 1 0 1

Streams, in this order; those that would hold no tensor are left out:

    of every quantised tensor   its values, one array of its shape, where all dimensions but the last two are one if
                                there are more than three; a trellis's columns lie as they are taken
    of every role as above      scales   a list of the scales of its tensors
                                orders   a list of matrices, one for each number of columns among its trellises, by the
                                         first of them: the orders of those, one below the other
                                floats   a list of its float tensors

Each blob must hold arrays of these shapes, integers for values and orders, floats of 2 or 4 bytes for the rest. How
they are coded is the blob's own affair. Members, roles and numbers that are not named here, numbers that are not finite
and anything after the last stream make a file invalid.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from reprlib import repr as shortened
from typing import Any

ROLES = ("embedding", "attention", "mlp", "control")
QUANTIZED_BITS = range(2, 9)
FLOAT_BITS = (16, 32)
TRELLIS_STATES = (4, 8)
ORDER_BITS = 2
MANIFEST_LIMIT_BYTES = 256 * 1024

_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_MOST_TENSORS = 1024
_MOST_DIMENSIONS = 8
_LARGEST_INTEGER = 2**63 - 1
_DEEPEST_METADATA = 8
_MOST_TRELLIS_COLUMNS = 65536


@dataclass(frozen=True)
class Entry:
    """One tensor as the manifest describes it."""

    name: str
    role: str
    shape: tuple[int, ...]
    bits: int
    states: int


@dataclass(frozen=True)
class Stream:
    """Arrays of one or more tensors that are coded together."""

    label: str  # "<tensor>:values", "<role>:scales", "<role>:orders" or "<role>:floats"
    role: str
    part: str  # values | scales | orders | floats
    members: tuple[int, ...]  # which tensors
    shapes: tuple[tuple[int, ...], ...]  # of the arrays
    itemsizes: tuple[int, ...]  # bytes of a value, one for each array

    @property
    def counts(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def decoded_bytes(self) -> int:
        return sum(count * size for count, size in zip(self.counts, self.itemsizes, strict=True))


def order_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the columns' order of a trellis tensor: its shape without rows."""
    return (*shape[:-2], shape[-1])


def bank_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most three dimensions: all but the last two become one."""
    return shape if len(shape) <= 3 else (math.prod(shape[:-2]), *shape[-2:])


def streams_of(entries: list[Entry]) -> list[Stream]:
    """The streams of a file in their order."""
    quantized = [i for i, entry in enumerate(entries) if entry.bits in QUANTIZED_BITS]
    found = [
        Stream(f"{entries[i].name}:values", entries[i].role, "values", (i,), (bank_shape(entries[i].shape),), (1,))
        for i in quantized
    ]
    for role in ROLES:
        own = [i for i, entry in enumerate(entries) if entry.role == role]
        scaled = [i for i in own if entries[i].bits in QUANTIZED_BITS]
        ordered = [i for i in own if entries[i].states]
        floats = [i for i in own if entries[i].bits in FLOAT_BITS]
        shapes: dict[str, list[tuple[int, ...]]] = {
            "scales": [entries[i].shape[:-1] for i in scaled],
            "orders": _stacked([order_shape(entries[i].shape) for i in ordered]),
            "floats": [entries[i].shape for i in floats],
        }
        sizes = {
            "scales": [2] * len(scaled),
            "orders": [1] * len(shapes["orders"]),
            "floats": [entries[i].bits // 8 for i in floats],
        }
        for part, members in (("scales", scaled), ("orders", ordered), ("floats", floats)):
            if members:
                arrays = (tuple(shapes[part]), tuple(sizes[part]))
                found.append(Stream(f"{role}:{part}", role, part, tuple(members), *arrays))
    return found


def _stacked(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of equal width as one matrix, in the order of their first."""
    rows: dict[int, int] = {}
    for shape in shapes:
        rows[shape[-1]] = rows.get(shape[-1], 0) + math.prod(shape[:-1])
    return [(count, width) for width, count in rows.items()]


def read_manifest(text: bytes, limit_bytes: int) -> tuple[dict[str, Any], list[Entry]]:
    """Metadata and tensors of a manifest; ValueError unless every member is as the module's docstring says."""
    try:
        manifest = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"manifest is not acceptable JSON: {error}") from None
    _check_members(manifest, {"metadata", "tensors"}, "manifest")
    metadata, members = manifest["metadata"], manifest["tensors"]
    check_metadata(metadata)
    if not isinstance(members, list):
        raise ValueError("manifest: tensors must be a list")
    if len(members) > _MOST_TENSORS:
        raise ValueError(f"{len(members)} tensors; at most {_MOST_TENSORS} are accepted")
    entries = [_read_entry(member, index) for index, member in enumerate(members)]
    check_together(entries, limit_bytes)
    return metadata, entries


def _read_entry(member: Any, index: int) -> Entry:
    place = f"manifest: tensor {index}"
    if not isinstance(member, dict) or type(member.get("bits")) is not int:
        raise ValueError(f"{place} must be an object with bits")
    quantized = member["bits"] in QUANTIZED_BITS
    _check_members(member, {"name", "role", "shape", "bits"} | ({"states"} if quantized else set()), place)
    name, role, shape, bits = member["name"], member["role"], member["shape"], member["bits"]
    states = member["states"] if quantized else 0
    if not isinstance(shape, list):
        raise ValueError(f"{place}: shape must be a list, not {shortened(shape)}")
    check_description(name, role, tuple(shape), bits, states)
    return Entry(name, role, tuple(shape), bits, states)


def check_description(name: Any, role: Any, shape: tuple[Any, ...], bits: Any, states: Any = 0) -> None:
    """What can be said of a tensor without its values."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"tensor name {shortened(name)} is not 1 to 128 characters out of A-Z a-z 0-9 _ . / -")
    if role not in ROLES:
        raise ValueError(f"tensor {name}: role {shortened(role)} is unknown; known are {', '.join(ROLES)}")
    if type(bits) is not int or (bits not in QUANTIZED_BITS and bits not in FLOAT_BITS):
        raise ValueError(f"tensor {name}: bits must be 2 to 8, 16 or 32, not {shortened(bits)}")
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError(
            f"tensor {name}: shape {shortened(shape)} is not {_MOST_DIMENSIONS} or fewer sizes below 2**31"
        )
    if bits in QUANTIZED_BITS and not shape:
        raise ValueError(f"tensor {name}: a quantised tensor needs at least one dimension")
    if states == 0 and type(states) is int:
        return
    if type(states) is not int or states not in TRELLIS_STATES or bits not in QUANTIZED_BITS:
        raise ValueError(f"tensor {name}: states must be 0, or 4 or 8 where bits are 2 to 8, not {shortened(states)}")
    if len(shape) not in (2, 3) or shape[-1] > _MOST_TRELLIS_COLUMNS:
        raise ValueError(
            f"tensor {name}: shape {shortened(shape)} is not that of a trellis: "
            f"2 or 3 dimensions, at most {_MOST_TRELLIS_COLUMNS} columns"
        )


def check_together(entries: list[Entry], limit_bytes: int) -> None:
    """Names are unique, and all tensors decoded plus one working copy of the largest stream fit in `limit_bytes`.

    Dimensions of size 0 count as 1, so that no shape is absurd.
    """
    names = set()
    for entry in entries:
        if entry.name in names:
            raise ValueError(f"tensor name {entry.name} is used twice")
        names.add(entry.name)
    solid = [replace(entry, shape=tuple(max(size, 1) for size in entry.shape)) for entry in entries]
    sizes = [stream.decoded_bytes for stream in streams_of(solid)]
    needed = sum(sizes) + max(sizes, default=0)
    if needed > limit_bytes:
        raise ValueError(f"tensors need {needed} bytes of memory to decode; the limit is {limit_bytes}")


def _check_members(value: Any, members: set[str], place: str) -> None:
    if not isinstance(value, dict) or set(value) != members:
        raise ValueError(f"{place} must be an object with exactly the members {', '.join(sorted(members))}")


def check_metadata(metadata: Any) -> None:
    """Metadata is an object of plain, finite, shallow JSON values."""
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, not {shortened(metadata)}")
    _check_json_value(metadata, 0)


def _check_json_value(value: Any, depth: int) -> None:
    if depth > _DEEPEST_METADATA:
        raise ValueError(f"metadata is nested deeper than {_DEEPEST_METADATA}")
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise ValueError(f"metadata: {shortened(key)} is not a string and cannot be a key")
            _check_json_value(key, depth)
            _check_json_value(member, depth + 1)
    elif isinstance(value, list | tuple):
        for member in value:
            _check_json_value(member, depth + 1)
    elif isinstance(value, str):
        if not value.isascii():
            value.encode("utf-8")  # half of a surrogate pair is a UnicodeEncodeError, which is a ValueError
    elif type(value) is int:
        if abs(value) > _LARGEST_INTEGER:
            raise ValueError(f"metadata: {shortened(value)} is not an integer of 64 bits")
    elif not (value is None or type(value) is bool or (type(value) is float and math.isfinite(value))):
        raise ValueError(f"metadata: {shortened(value)} is not a finite JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is used twice in one object")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > len(str(-_LARGEST_INTEGER)):
        raise ValueError("an integer has more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value
