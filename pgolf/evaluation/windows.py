"""How a validation split is cut for scoring: which tokens each target is predicted from.

A target is any token of the split but the first, and each is scored exactly once. The split, or each document of it, is
seen through windows of at most `seq_len` input tokens. The first begins where the text begins and scores all its
targets; each further one ends `stride` tokens after the one before, the last where the text ends, and scores what is
new. So a target is predicted from more than `seq_len - stride` tokens before it, or from all there are. With stride =
seq_len windows do not overlap, but the last one, which reaches back for context.

With documents, a window never reaches across a BOS. The BOS itself is a target, predicted from the document before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.data.batch import MicroBatch, cu_seqlens


@dataclass(frozen=True)
class Windows:
    """int64 (count,) each, in the order of the text."""

    begin: np.ndarray  # first input token
    size: np.ndarray  # input tokens
    new: np.ndarray  # targets that are scored: the last ones

    @classmethod
    def of(cls, tokens: Tensor, seq_len: int, stride: int, bos_id: int | None = None) -> "Windows":
        """The windows of `tokens` (count,); with `bos_id`, of each of its documents."""
        borders = np.unique((0, max(len(tokens) - 1, 0)))
        if bos_id is not None:
            starts = (tokens[:-1] == bos_id).nonzero()[:, 0].numpy()
            borders = np.unique(np.concatenate((borders, starts)))
        first, size = borders[:-1], np.diff(borders)
        head = np.minimum(size, seq_len)
        count = 1 - (head - size) // stride  # of each text, rounded up
        text = np.repeat(np.arange(len(size)), count)
        turn = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)  # 0 for a text's first window
        end = np.minimum(head[text] + turn * stride, size[text])
        before = np.where(turn > 0, head[text] + (turn - 1) * stride, 0)
        return cls(first[text] + end - head[text], head[text], end - before)

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, part: slice) -> "Windows":
        return Windows(self.begin[part], self.size[part], self.new[part])

    def groups(self, batch_tokens: int) -> np.ndarray:
        """Windows that share a forward pass: the i-th group is groups[i] up to groups[i + 1]; at least one each."""
        ends = np.cumsum(self.size)
        groups = [0]
        while groups[-1] < len(self):
            room = (ends[groups[-1] - 1] if groups[-1] else 0) + batch_tokens
            groups.append(max(groups[-1] + 1, int(np.searchsorted(ends, room, side="right"))))
        return np.array(groups)


class ScoringBatch(NamedTuple):
    batch: MicroBatch
    scored: Tensor  # int64, places in the flattened batch whose targets are scored, in the order of the text
    first: int  # number of the first such target, 0 for tokens[1]; the others follow without a gap


class ScoringBatches:
    """What the forward passes of one rank get. Ranks take turns in the same list of batches, so that a token's loss
    does not depend on their number, and what they find comes together in the order of the text."""

    def __init__(
        self,
        tokens: Tensor,  # (count,) integer
        seq_len: int,
        batch_tokens: int,  # of a batch, but for a single window that is longer
        stride: int = 0,  # 0: seq_len
        bos_id: int | None = None,  # given: documents are scored alone
        rank: int = 0,
        world_size: int = 1,
    ):
        self.tokens, self.seq_len, self.bos_id = tokens, seq_len, bos_id
        self.windows = Windows.of(tokens, seq_len, stride or seq_len, bos_id)
        groups = self.windows.groups(batch_tokens)
        self.groups = list(pairwise(groups.tolist()))[rank::world_size]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ScoringBatch]:
        for first, last in self.groups:
            yield self._batch(self.windows[first:last])

    def _batch(self, windows: Windows) -> ScoringBatch:
        size, ends = windows.size, np.cumsum(windows.size)
        place = np.arange(ends[-1])  # in the flattened batch
        within = place - np.repeat(ends - size, size)
        source = torch.from_numpy(np.repeat(windows.begin, size) + within)
        scored = np.flatnonzero(within >= np.repeat(size - windows.new, size))
        inputs, targets = self.tokens[source].long(), self.tokens[source + 1].long()
        if self.bos_id is None:  # one text, so all its windows have one length
            batch = MicroBatch(inputs.view(len(size), -1), targets.view(len(size), -1))
        else:
            borders = cu_seqlens(ends - size, len(inputs), self.seq_len)
            batch = MicroBatch(inputs[None], targets[None], borders, self.seq_len)
        first = windows.begin[0] + windows.size[0] - windows.new[0]
        return ScoringBatch(batch, torch.from_numpy(scored), int(first))
