"""Batches of tokens for training, and rows of tokens for scoring.

A training row is a window of `seq_len + 1` tokens of one shard. Windows stand `seq_len` apart, so that within an epoch
no token is a target twice; in every epoch they begin at another random offset in each shard and come in another random
order. All of it follows from (seed, epoch), which is why a position is two numbers and a run can be resumed with
any number of processes. Windows that an epoch has left over open the next batch; nothing is dropped.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf.data.shards import read_shard
from pgolf.errors import DataError, UserError


class TokenLoader:
    """Endless batches from token shards.

    The global batch is the same rows in the same order for every world size; rank r gets the r-th contiguous part.
    Errors: `UserError` when `batch_tokens` does not divide into whole rows for every rank; `DataError` when no shard
    holds one window, or a batch meets a token that is not below `vocab_size`.
    """

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        seq_len: int,
        batch_tokens: int,  # of the global batch
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        vocab_size: int | None = None,
    ):
        if seq_len < 1 or batch_tokens < 1 or batch_tokens % (seq_len * world_size):
            raise UserError(
                f"a batch of {batch_tokens} tokens is not a whole number of rows of {seq_len} tokens for each of "
                f"{world_size} processes; accepted are multiples of {seq_len * world_size}"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is outside 0..{world_size - 1}")
        self.seq_len = seq_len
        self.seed = seed
        self.vocab_size = vocab_size
        self.rows = batch_tokens // seq_len
        self._first_row = rank * (self.rows // world_size)
        self._last_row = self._first_row + self.rows // world_size
        self._paths = list(shards)
        self._tokens = [read_shard(path) for path in self._paths]
        if not any(len(tokens) > seq_len for tokens in self._tokens):
            sizes = ", ".join(f"{path} has {len(t)}" for path, t in zip(self._paths[:3], self._tokens[:3], strict=True))
            raise DataError(
                f"no training shard holds {seq_len + 1} tokens, one row and its last target: {sizes or 'none'}"
            )
        self._epoch = 0
        self._position = 0  # windows of this epoch already given out, over all ranks
        self._shard_of, self._start_of = self._windows(0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), both int64 (rows of this rank, seq_len) on the CPU; targets are one token later."""
        shard_of, start_of = self._take(self.rows)
        mine = slice(self._first_row, self._last_row)
        batch = np.stack(
            [
                self._tokens[shard][start : start + self.seq_len + 1]
                for shard, start in zip(shard_of[mine].tolist(), start_of[mine].tolist(), strict=True)
            ]
        )
        if self.vocab_size is not None and int(batch.max()) >= self.vocab_size:
            row, column = (int(index) for index in np.argwhere(batch >= self.vocab_size)[0])
            path = self._paths[int(shard_of[mine][row])]
            raise DataError(
                f"{path}: token {int(batch[row, column])} at index {int(start_of[mine][row]) + column}, "
                f"but the vocabulary has {self.vocab_size} pieces"
            )
        tokens = torch.from_numpy(batch.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers, the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, at any world size.

        `DataError` when the state belongs to other shards, another row length or another seed.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(f"cannot resume the data order: {name} was {state.get(name)} and is now {mine}")
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._shard_of, self._start_of = self._windows(self._epoch)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "seq_len": self.seq_len, "shard_tokens": [len(tokens) for tokens in self._tokens]}

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token) of every window of `epoch` in the order of training: int32 (w,) and int64 (w,)."""
        random = np.random.default_rng((abs(self.seed), int(self.seed < 0), epoch))
        shards, starts = [], []
        for shard, tokens in enumerate(self._tokens):
            if len(tokens) <= self.seq_len:
                continue
            phase = random.integers(min(self.seq_len, len(tokens) - self.seq_len))
            first = np.arange(phase, len(tokens) - self.seq_len, self.seq_len, dtype=np.int64)
            starts.append(first)
            shards.append(np.full(len(first), shard, dtype=np.int32))
        order = random.permutation(sum(map(len, starts)))
        return np.concatenate(shards)[order], np.concatenate(starts)[order]

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` windows, over as many epochs as that needs."""
        shards, starts = [], []
        while count:
            if self._position == len(self._start_of):
                self._epoch += 1
                self._position = 0
                self._shard_of, self._start_of = self._windows(self._epoch)
            part = slice(self._position, self._position + count)
            shards.append(self._shard_of[part])
            starts.append(self._start_of[part])
            self._position += len(starts[-1])
            count -= len(starts[-1])
        return np.concatenate(shards), np.concatenate(starts)


def sequential_rows(
    tokens: Tensor,  # (n,) integer
    seq_len: int,
    rows_at_once: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows for scoring, in order: (inputs, targets), int64 (up to `rows_at_once`, seq_len), targets one token later.

    Every token but the first is a target exactly once: what does not fill a row comes last, as one shorter row.
    """
    full_rows = max(len(tokens) - 1, 0) // seq_len
    for row in range(0, full_rows, rows_at_once):
        first, last = row * seq_len, min(row + rows_at_once, full_rows) * seq_len
        yield tokens[first:last].long().view(-1, seq_len), tokens[first + 1 : last + 1].long().view(-1, seq_len)
    tail = full_rows * seq_len
    if tail < len(tokens) - 1:
        yield tokens[tail:-1].long().view(1, -1), tokens[tail + 1 :].long().view(1, -1)
