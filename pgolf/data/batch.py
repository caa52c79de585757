"""One rank's part of a training batch, how it is cut into micro-batches, and where documents begin in it.

`cu_seqlens` is what variable-length attention kernels take: borders in a stream of `length` tokens, the first 0, the
last `length`, int32. Between two borders tokens see each other, across one they do not. Its size is fixed by `slots`,
so that compiled code sees one shape: entries that are not needed repeat `length`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DOCUMENT_TOKENS = 256  # `slots` suffice where documents have so many on average; FineWeb's have about 950


class MicroBatch(NamedTuple):
    """What one forward pass takes, in the order of the arguments of `Model.loss`."""

    inputs: Tensor  # (rows, length) int64
    targets: Tensor  # like inputs, one token later
    cu_seqlens: Tensor | None = None  # over the rows laid end to end; None: each row is seen whole
    max_seqlen: int = 0  # between two borders at most

    def to(self, device: torch.device) -> "MicroBatch":
        """On `device`; a copy from pinned memory is not waited for."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        inputs, targets = (x.to(device, non_blocking=True) for x in self[:2])
        return MicroBatch(inputs, targets, borders, self.max_seqlen)


class Batch(NamedTuple):
    """Rows of tokens, or one row that is a stream of documents."""

    inputs: Tensor  # (rows, length) int64
    targets: Tensor  # like inputs, one token later
    starts: np.ndarray | None = None  # int64, where documents begin in a stream; None: rows know no documents

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), self.starts)

    def pinned(self) -> "Batch":
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), self.starts)

    def micro_batches(self, tokens: int, seq_len: int) -> Iterator[MicroBatch]:
        """Parts of `tokens` tokens, the last with what is left: rows of `seq_len`, or a row of documents that are cut
        where they are longer than that."""
        begin = 0
        for inputs, targets in zip(
            self.inputs.flatten().split(tokens), self.targets.flatten().split(tokens), strict=True
        ):
            if self.starts is None:
                yield MicroBatch(inputs.view(-1, seq_len), targets.view(-1, seq_len))
            else:
                length = len(inputs)
                first, last = np.searchsorted(self.starts, (begin, begin + length))
                borders = cu_seqlens(self.starts[first:last] - begin, length, seq_len)
                borders = borders.pin_memory() if inputs.is_cuda else borders
                on_device = borders.to(inputs.device, non_blocking=True)
                yield MicroBatch(inputs[None], targets[None], on_device, min(seq_len, length))
                begin += length


def cu_seqlens(starts: np.ndarray, length: int, seq_len: int) -> Tensor:
    """int32 (slots,): the borders of a stream with documents at `starts` (ascending, in 0..length - 1), in pieces of
    at most `seq_len`."""
    borders = np.unique(np.concatenate(([0], starts, [length])))
    sizes = np.diff(borders)
    pieces = -(-sizes // seq_len)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # which piece of its document
    cut = np.repeat(borders[:-1], pieces) + within * seq_len
    padded = np.full(slots(length, seq_len, len(cut) + 1), length, dtype=np.int32)
    padded[: len(cut)] = cut
    return torch.from_numpy(padded)


def slots(length: int, seq_len: int, needed: int = 0) -> int:
    """How many entries `cu_seqlens` has: a multiple of 64, doubled when very short documents need more."""
    size = 64 * -(-(length // DOCUMENT_TOKENS + length // seq_len + 2) // 64)
    while size < needed:
        size *= 2
    return size
