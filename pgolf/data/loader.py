"""Batches of tokens for training: windows of the shards.

A window is `seq_len + 1` tokens of one shard. Windows stand `seq_len` apart, so that within an epoch no token is a
target twice; in every epoch they begin at another random offset in each shard and come in another order: `shuffled`, or
by a stride that has no divisor in common with their number (`coprime`, after #726), which visits each once too, needs
no table, and by the golden ratio takes of every shard its share in every batch. All of it follows from (seed, epoch),
which is why a position is two numbers and a run can be resumed with any number of processes. Windows that an epoch has
left over open the next batch; nothing is dropped.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pgolf.data.batch import Batch
from pgolf.data.shards import read_shard
from pgolf.errors import DataError, UserError

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class TokenLoader:
    """Endless batches from token shards.

    The global batch is the same rows in the same order for every world size; rank r gets the r-th contiguous part.

    Raises:
        UserError: `batch_tokens` does not divide into whole rows for every rank.
        DataError: a shard is empty, none holds one window, or a batch meets a token that is not below `vocab_size`.
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
        order: Literal["shuffled", "coprime"] = "shuffled",
    ):
        check_shares(batch_tokens, seq_len, rank, world_size)
        self.seq_len = seq_len
        self.seed = seed
        self.vocab_size = vocab_size
        self.order = order
        self.rows = batch_tokens // seq_len
        self._first_row = rank * (self.rows // world_size)
        self._last_row = self._first_row + self.rows // world_size
        self._paths = list(shards)
        self._tokens = open_shards(self._paths)
        if not any(len(tokens) > seq_len for tokens in self._tokens):
            sizes = ", ".join(f"{path} has {len(t)}" for path, t in zip(self._paths[:3], self._tokens[:3], strict=True))
            raise DataError(
                f"no training shard holds {seq_len + 1} tokens, one row and its last target: {sizes or 'none'}"
            )
        self._epoch = 0
        self._position = 0  # windows of this epoch already given out, over all ranks
        self._begin_epoch(0)

    def next_batch(self) -> Batch:
        """Inputs and targets, both int64 (rows of this rank, seq_len) on the CPU; targets are one token later."""
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
            path, index = self._paths[int(shard_of[mine][row])], int(start_of[mine][row]) + column
            raise outside_vocabulary(path, int(batch[row, column]), index, self.vocab_size)
        tokens = torch.from_numpy(batch.astype(np.int64))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers, the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, at any world size.

        `DataError` when the state belongs to other shards, another row length, another order or another seed.
        """
        check_identity(state, self._identity())
        epoch, position = whole_numbers(state, "epoch", "position")
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        if position > self._windows:
            raise DataError(f"cannot resume the data order: position {position} of {self._windows} windows")
        self._position = position

    def _identity(self) -> dict[str, Any]:
        sizes = [len(tokens) for tokens in self._tokens]
        return {"loader": self.order, "seed": self.seed, "seq_len": self.seq_len, "shard_tokens": sizes}

    def _begin_epoch(self, epoch: int) -> None:
        """Draw where the windows of each shard begin, and the order of all."""
        self._epoch = epoch
        random = generator(self.seed, epoch)
        shards, phases, counts = [], [], []
        for shard, tokens in enumerate(self._tokens):
            if len(tokens) > self.seq_len:
                shards.append(shard)
                phases.append(random.integers(min(self.seq_len, len(tokens) - self.seq_len)))
                counts.append(-((phases[-1] - len(tokens) + self.seq_len) // self.seq_len))
        self._shards, self._phases = np.array(shards), np.array(phases)
        self._ends = np.cumsum(counts)  # windows of the shards up to each, and including it
        self._windows = int(self._ends[-1])
        self._window_at = (
            _shuffled(random, self._windows) if self.order == "shuffled" else _coprime(random, self._windows)
        )

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token) of the next `count` windows, over as many epochs as that needs: int64 (count,)."""
        shards, starts = [], []
        while count:
            if self._position == self._windows:
                self._begin_epoch(self._epoch + 1)
                self._position = 0
            part = min(count, self._windows - self._position)
            window = self._window_at(np.arange(self._position, self._position + part))
            index = np.searchsorted(self._ends, window, side="right")
            within = window - np.where(index > 0, self._ends[index - 1], 0)
            shards.append(self._shards[index])
            starts.append(self._phases[index] + within * self.seq_len)
            self._position += part
            count -= part
        return np.concatenate(shards), np.concatenate(starts)


def _shuffled(random: np.random.Generator, count: int) -> Callable[[np.ndarray], np.ndarray]:
    order = random.permutation(count)
    return lambda positions: order[positions]


def _coprime(random: np.random.Generator, count: int) -> Callable[[np.ndarray], np.ndarray]:
    first, stride = int(random.integers(count)), max(1, round(GOLDEN_RATIO * count))
    while math.gcd(stride, count) > 1:
        stride += 1
    return lambda positions: (first + positions * stride) % count


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Random numbers that follow from `seed`, of either sign, and `numbers`, 0 or more."""
    return np.random.default_rng((abs(seed), int(seed < 0), *numbers))


def open_shards(paths: Sequence[str | os.PathLike[str]]) -> list[np.ndarray]:
    """The tokens of all shards, memory-mapped; `DataError` names one that is empty."""
    tokens = [read_shard(path) for path in paths]
    for path, shard in zip(paths, tokens, strict=True):
        if not len(shard):
            raise DataError(f"{path}: no tokens; a training shard holds some (was its making or download cut short?)")
    return tokens


def check_shares(batch_tokens: int, seq_len: int, rank: int, world_size: int) -> None:
    if seq_len < 1 or batch_tokens < 1 or batch_tokens % (seq_len * world_size):
        raise UserError(
            f"a batch of {batch_tokens} tokens is not a whole number of rows of {seq_len} tokens for each of "
            f"{world_size} processes; accepted are multiples of {seq_len * world_size}"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is outside 0..{world_size - 1}")


def check_identity(state: dict[str, Any], mine: dict[str, Any]) -> None:
    for name, value in mine.items():
        if state.get(name) != value:
            raise DataError(f"cannot resume the data order: {name} was {state.get(name)} and is now {value}")


def whole_numbers(state: dict[str, Any], *names: str) -> list[int]:
    """The numbers of a loader's state by name, which a damaged file can make anything."""
    for name in names:
        if type(state.get(name)) is not int or not 0 <= state[name] < 2**63:
            raise DataError(f"cannot resume the data order: {name} must be a whole number from 0 on")
    return [state[name] for name in names]


def outside_vocabulary(path: str | os.PathLike[str], token: int, index: int, vocab_size: int) -> DataError:
    return DataError(f"{path}: token {token} at index {index}, but the vocabulary has {vocab_size} pieces")
