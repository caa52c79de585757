"""Batches of whole documents, packed into one stream without gaps.

A document begins with its BOS token and ends before the next one; what stands before the first BOS of a shard, the rest
of a document that began in another, counts as one. In every epoch the shards come in another random order, and the
documents of each shard too. The documents are laid end to end and the stream is cut into batches; the last token of
a document has the BOS of the following one as its target. All of it follows from (seed, epoch), so a position is three
numbers and a run can be resumed with any number of processes. Only the shard in use is indexed.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pgolf.data.batch import Batch
from pgolf.data.loader import check_identity, check_shares, generator, open_shards, outside_vocabulary, whole_numbers
from pgolf.errors import DataError

SCAN = 1 << 20  # tokens looked at once when a BOS is searched


class Place(NamedTuple):
    """A position in the stream of all epochs."""

    epoch: int
    shard: int  # in the order of the epoch
    token: int  # in the shard's shuffled documents


class DocumentLoader:
    """Endless batches, the same stream for every world size; rank r gets the r-th contiguous part.

    Raises:
        UserError: `batch_tokens` does not divide by `world_size`.
        DataError: there is no shard, one is empty or has no BOS, or a batch meets a token that is not below
            `vocab_size`.
    """

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        bos_id: int,
        batch_tokens: int,  # of the global batch
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        vocab_size: int | None = None,
    ):
        check_shares(batch_tokens, 1, rank, world_size)
        self.bos_id, self.batch_tokens, self.seed, self.vocab_size = bos_id, batch_tokens, seed, vocab_size
        self._share = batch_tokens // world_size
        self._first = rank * self._share
        self._paths = list(shards)
        self._tokens = open_shards(self._paths)
        if not self._tokens:
            raise DataError("no training shard")
        for path, tokens in zip(self._paths, self._tokens, strict=True):
            if not any((tokens[i : i + SCAN] == bos_id).any() for i in range(0, len(tokens), SCAN)):
                raise DataError(
                    f"{path}: no token {bos_id}, with which a document begins; LOADER=shuffled and coprime need none"
                )
        self._place = Place(0, 0, 0)
        self._orders: dict[int, np.ndarray] = {}  # of the shards, by epoch
        self._indices: dict[tuple[int, int], _Index] = {}  # by (epoch, shard): of the shard in use and the one before

    def next_batch(self) -> Batch:
        """Inputs and targets, int64 (1, tokens of this rank) on the CPU, and where documents begin in them."""
        begin = self._move(self._place, self._first)
        tokens, starts = self._read(begin, self._share + 1)  # one more, the last target
        self._place = self._move(self._place, self.batch_tokens)
        stream = torch.from_numpy(tokens.astype(np.int64))[None]
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), starts[starts < self._share])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers, the same on every rank."""
        return {**self._place._asdict(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, at any world size. `DataError` when it is of other data."""
        check_identity(state, self._identity())
        place = Place(*whole_numbers(state, *Place._fields))
        if place.shard >= len(self._tokens) or place.token >= len(self._tokens[self._shard(place)]):
            raise DataError(f"cannot resume the data order: there is no {place}")
        self._place = place

    def _identity(self) -> dict[str, Any]:
        sizes = [len(tokens) for tokens in self._tokens]
        return {"loader": "documents", "seed": self.seed, "bos_id": self.bos_id, "shard_tokens": sizes}

    def _shard(self, place: Place) -> int:
        if place.epoch not in self._orders:
            order = generator(self.seed, place.epoch).permutation(len(self._tokens))
            self._orders = {place.epoch: order, **dict(list(self._orders.items())[:1])}
        return int(self._orders[place.epoch][place.shard])

    def _move(self, place: Place, count: int) -> Place:
        """`count` tokens on."""
        while count >= (left := len(self._tokens[self._shard(place)]) - place.token):
            count -= left
            last = place.shard + 1 == len(self._tokens)
            place = Place(place.epoch + 1, 0, 0) if last else Place(place.epoch, place.shard + 1, 0)
        return place._replace(token=place.token + count)

    def _read(self, place: Place, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from `place` on, uint16, and where among them documents begin, int64."""
        parts, starts, done = [], [], 0
        while done < count:
            shard = self._shard(place)
            tokens, index = self._tokens[shard], self._index(place.epoch, shard)
            part = min(count - done, len(tokens) - place.token)
            for first, last, at in index.pieces(place.token, place.token + part):
                piece = tokens[first:last]
                self._check(piece, shard, first)
                parts.append(piece)
                if at >= 0:
                    starts.append(done + at)
            done += part
            place = self._move(place, part)
        return np.concatenate(parts), np.array(starts, dtype=np.int64)

    def _check(self, piece: np.ndarray, shard: int, first: int) -> None:
        if self.vocab_size is not None and int(piece.max()) >= self.vocab_size:
            at = int(np.argmax(piece >= self.vocab_size))
            raise outside_vocabulary(self._paths[shard], int(piece[at]), first + at, self.vocab_size)

    def _index(self, epoch: int, shard: int) -> "_Index":
        if (epoch, shard) not in self._indices:
            index = _Index(self._tokens[shard], self.bos_id, generator(self.seed, epoch, shard))
            self._indices = {(epoch, shard): index, **dict(list(self._indices.items())[:1])}
        return self._indices[epoch, shard]


class _Index:
    """The documents of one shard in the order of one epoch."""

    def __init__(self, tokens: np.ndarray, bos_id: int, random: np.random.Generator):
        borders = np.unique(np.concatenate(([0], np.flatnonzero(tokens == bos_id), [len(tokens)])))
        order = random.permutation(len(borders) - 1)
        self.first = borders[:-1][order]  # of each document, in the shard
        self.size = np.diff(borders)[order]
        self.at = np.cumsum(self.size) - self.size  # of each document, in the stream

    def pieces(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """What of the documents stands in begin..end of the stream: (first, last) in the shard, and where the document
        begins, counted from `begin` (negative: before it)."""
        low = int(np.searchsorted(self.at, begin, side="right")) - 1
        high = int(np.searchsorted(self.at, end))
        found = []
        for first, size, at in zip(*(x[low:high].tolist() for x in (self.first, self.size, self.at)), strict=True):
            found.append((first + max(0, begin - at), first + min(size, end - at), at - begin))
        return found
