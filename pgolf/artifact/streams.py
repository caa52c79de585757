"""The streams of an artifact: arrays of one or more tensors as one blob of `pgolf.artifact.coder`, and back.

Which arrays a stream holds is told in `pgolf/artifact/manifest.py`, and computed by `manifest.streams_of`. Decoding
checks that a blob holds arrays of exactly the shapes and widths that the manifest demands before anything is allocated
for them; what is wrong is a ValueError of one line.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact import coder
from pgolf.artifact.manifest import Entry, Stream, order_shape

PERMUTED_VALUES = 1 << 20  # whose places are held at a time


def encode(stream: Stream, arrays: list[Tensor], states: int, mode: str, threads: int) -> bytes:
    """`arrays` on the CPU, as `gather` returns them."""
    if stream.part in ("scales", "floats"):
        return coder.encode_floats(arrays)
    if stream.part == "orders":
        return coder.encode(arrays, mode, threads=threads)
    return coder.encode(arrays[0], mode, states, threads)


def gather(stream: Stream, parts: list[Tensor], orders: list[Tensor | None]) -> list[Tensor]:
    """What a stream holds, from the tensors' values, scales or orders."""
    if stream.part == "values":
        values = parts[0] if orders[0] is None else in_order(parts[0], orders[0])
        return [values.reshape(stream.shapes[0])]
    if stream.part == "orders":
        flat = [part.reshape(math.prod(part.shape[:-1]), part.shape[-1]) for part in parts]
        return [torch.cat([each for each in flat if each.shape[1] == width]) for _, width in stream.shapes]
    return parts


def decode(stream: Stream, blob: memoryview, threads: int) -> list[Tensor]:
    """The arrays of a blob."""
    floats = stream.part in ("scales", "floats")
    held = coder.describe(blob)
    expected = list(zip(stream.shapes, stream.itemsizes, strict=True))
    if held.tensors != expected or held.is_list != (stream.part != "values") or (held.mode == "floats") != floats:
        raise ValueError("does not hold what the manifest says")
    decoded = coder.decode_floats(blob) if floats else coder.decode(blob, threads)
    arrays = decoded if isinstance(decoded, list) else [decoded]
    return [torch.from_numpy(np.require(each, requirements="A")) for each in arrays]


def scatter(stream: Stream, arrays: list[Tensor], entries: list[Entry]) -> list[Tensor]:
    """The inverse of `gather` for all parts but a trellis's values, which wait for their order."""
    if stream.part == "values":
        return [arrays[0].reshape(entries[0].shape)]
    if stream.part != "orders":
        return arrays
    stacks = {array.shape[-1]: array for array in arrays}
    found = []
    for entry in entries:
        shape = order_shape(entry.shape)
        rows = math.prod(shape[:-1])
        found.append(stacks[shape[-1]][:rows].reshape(shape))
        stacks[shape[-1]] = stacks[shape[-1]][rows:]
    return found


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """The columns of every matrix by ascending order, equals as they come."""
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for source, target, places in _pieces(values, out, order):
        torch.gather(source, -1, places, out=target)
    return out


def out_of_order(values: Tensor, order: Tensor) -> Tensor:
    """The inverse of `in_order`."""
    out = torch.empty_like(values)
    for source, target, places in _pieces(values, out, order):
        target.scatter_(-1, places, source)
    return out


def _pieces(source: Tensor, target: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some matrices of both at a time, and where each of their columns lies."""
    if not source.numel():
        return
    rows, columns = source.shape[-2:]
    at_once = max(1, PERMUTED_VALUES // columns)
    bank = (-1, rows, columns)
    for a, b, classes in zip(
        source.reshape(bank).split(at_once),
        target.view(bank).split(at_once),
        order.reshape(-1, columns).split(at_once),
        strict=True,
    ):
        places = classes.argsort(dim=-1, stable=True)
        yield a, b, places.unsqueeze(-2).expand(a.shape)
