"""Packed documents: the stream, its borders, micro-batches, and batches made ready ahead."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.batch import Batch, cu_seqlens, slots
from pgolf.data.documents import DocumentLoader
from pgolf.data.loader import TokenLoader
from pgolf.data.prefetch import DEPTH, Prefetcher
from pgolf.data.shards import write_shard
from pgolf.errors import DataError, UserError

BOS = 1
CPU = torch.device("cpu")


def make_shards(folder, *shards) -> list:
    """A shard of documents each; a document is a BOS and so many tokens, which all differ."""
    paths, numbers = [], itertools.count(2)
    for index, sizes in enumerate(shards):
        tokens = [token for size in sizes for token in (BOS, *itertools.islice(numbers, size))]
        paths.append(folder / f"x_train_{index:06d}.bin")
        write_shard(paths[-1], np.array(tokens))
    return paths


def documents_of(tokens) -> list[tuple[int, ...]]:
    borders = [i for i, token in enumerate(tokens) if token == BOS]
    return [tuple(tokens[a:b]) for a, b in zip(borders, [*borders[1:], len(tokens)], strict=True)]


def stream(loader, batches: int) -> list[int]:
    return torch.cat([loader.next_batch().inputs[0] for _ in range(batches)]).tolist()


def test_an_epoch_is_every_document_once_in_another_order(tmp_path):
    shards = make_shards(tmp_path, [3, 5, 1, 7, 2, 9], [4, 6, 8], [1, 2, 11, 3, 5])
    loader = DocumentLoader(shards, BOS, batch_tokens=81, seed=3)  # an epoch
    expected = sorted(doc for path in shards for doc in documents_of(np.fromfile(path, "<u2")[512:].tolist()))
    epochs = [documents_of(stream(loader, 1)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert loader.state_dict()["epoch"] == 3


@pytest.mark.parametrize("batch_tokens", [1, 7, 30, 81, 200])
def test_targets_are_one_token_later_and_starts_are_documents(tmp_path, batch_tokens):
    shards = make_shards(tmp_path, [3, 5, 1, 7, 2, 9], [4, 6, 8], [1, 2, 11, 3, 5])
    whole = stream(DocumentLoader(shards, BOS, batch_tokens=81, seed=3), 6)
    loader = DocumentLoader(shards, BOS, batch_tokens, seed=3)
    for step in range(400 // batch_tokens):
        batch, at = loader.next_batch(), step * batch_tokens
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == (1, batch_tokens)
        assert batch.inputs[0].tolist() == whole[at : at + batch_tokens]
        assert batch.targets[0].tolist() == whole[at + 1 : at + batch_tokens + 1]
        assert batch.starts.tolist() == [i for i in range(batch_tokens) if whole[at + i] == BOS]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_every_world_size_has_the_same_stream_and_resumes_it(tmp_path, world_size):
    shards = make_shards(tmp_path, [3, 5, 1, 7], [4, 6, 8], [1, 2, 11])
    alone = DocumentLoader(shards, BOS, 24, seed=-9)
    stream(alone, 3)
    state, expected = alone.state_dict(), stream(alone, 8)
    ranks = [DocumentLoader(shards, BOS, 24, -9, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [token for _ in range(8) for rank in ranks for token in stream(rank, 1)] == expected
    with pytest.raises(DataError, match="seed was -9 and is now 9"):
        DocumentLoader(shards, BOS, 24, 9).load_state_dict(state)
    with pytest.raises(DataError, match="loader was documents and is now shuffled"):
        TokenLoader(shards, 8, 24, -9).load_state_dict(state)


def test_the_rest_of_a_document_at_the_head_of_a_shard_counts_as_one(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", np.array([7, 8, BOS, 9]))
    batch = DocumentLoader([tmp_path / "x_train_000000.bin"], BOS, 400, seed=0).next_batch()
    tokens, starts = batch.inputs[0].tolist(), set(batch.starts.tolist())
    assert starts == {i for i, token in enumerate(tokens) if token in (7, BOS)}
    assert {tuple(tokens[i : i + 4]) for i in range(0, 400, 4)} == {(7, 8, BOS, 9), (BOS, 9, 7, 8)}


def test_what_cannot_be_used_is_one_line(tmp_path):
    good = make_shards(tmp_path, [3, 5])[0]
    with pytest.raises(DataError, match=r"x_train_000000\.bin: no token 1500, with which a document begins; LOADER="):
        DocumentLoader([good], 1500, 8, 0)
    write_shard(tmp_path / "empty.bin", np.array([]))
    with pytest.raises(DataError, match=r"empty\.bin: no tokens"):
        DocumentLoader([good, tmp_path / "empty.bin"], BOS, 8, 0)
    with pytest.raises(DataError, match="no training shard"):
        DocumentLoader([], BOS, 8, 0)
    with pytest.raises(UserError, match="3 processes"):
        DocumentLoader([good], BOS, 8, 0, 0, 3)
    with pytest.raises(DataError, match=r"x_train_000000\.bin: token 9 at index 9, but the vocabulary has 9 pieces"):
        DocumentLoader([good], BOS, 80, 0, vocab_size=9).next_batch()


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 700), seq_len=st.integers(1, 300), data=st.data())
def test_borders_of_a_stream(length, seq_len, data):
    starts = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=length)))
    found = cu_seqlens(np.array(starts, dtype=np.int64), length, seq_len)
    assert found.dtype == torch.int32
    borders = found.tolist()
    used = sorted(set(borders))
    assert borders == used + [length] * (len(borders) - len(used))
    assert (used[0], used[-1]) == (0, length)
    assert set(starts) <= set(used)
    assert max(np.diff(used)) <= seq_len
    for border in used[1:-1]:  # no cut where none is needed
        before = max(start for start in [0, *starts] if start <= border)
        assert (border - before) % seq_len == 0
    assert len(borders) % 64 == 0
    assert len(borders) == slots(length, seq_len) or len(used) > slots(length, seq_len)


def test_usual_documents_never_change_the_shape():
    """An H100's share of the record's batch, in documents of 300 tokens on average."""
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = np.unique(random.integers(0, 98_304, 98_304 // 300))
        assert len(cu_seqlens(starts, 98_304, 2048)) == slots(98_304, 2048) == 448


def test_micro_batches_cut_rows_and_streams():
    tokens = torch.arange(96).view(4, 24)
    rows = list(Batch(tokens, tokens + 1).micro_batches(40, 8))
    assert [part.inputs.shape for part in rows] == [(5, 8), (5, 8), (2, 8)]
    assert torch.equal(torch.cat([part.inputs.flatten() for part in rows]), tokens.flatten())
    assert all(torch.equal(part.targets, part.inputs + 1) and part.cu_seqlens is None for part in rows)

    packed = Batch(tokens.view(1, 96), tokens.view(1, 96) + 1, np.array([3, 45, 50, 80]))
    parts = list(packed.micro_batches(40, 32))
    assert [part.inputs.shape for part in parts] == [(1, 40), (1, 40), (1, 16)]
    assert torch.equal(torch.cat([part.inputs for part in parts], 1), packed.inputs)
    borders = [sorted(set(part.cu_seqlens.tolist())) for part in parts]
    assert borders == [[0, 3, 35, 40], [0, 5, 10, 40], [0, 16]]
    assert [part.max_seqlen for part in parts] == [32, 32, 16]


def test_batches_made_ahead_are_the_same_and_resume(tmp_path):
    shards = make_shards(tmp_path, [3, 5, 1, 7], [4, 6, 8])

    def plain():
        return DocumentLoader(shards, BOS, 10, seed=2)

    ahead, loader = Prefetcher(plain(), CPU), plain()
    for _ in range(7):
        assert torch.equal(ahead.next_batch().inputs, loader.next_batch().inputs)
        assert ahead.state_dict() == loader.state_dict()  # not of the batches that are ready already
    state, expected = ahead.state_dict(), stream(loader, 4)
    assert stream(ahead, 4) == expected
    ahead.load_state_dict(state)
    assert stream(ahead, 4) == expected
    ahead.close()


def test_the_next_batches_are_under_way_while_one_is_used_and_errors_arrive():
    made, allowed = [], threading.Semaphore(DEPTH + 2)

    class Counting:
        def next_batch(self):
            allowed.acquire()
            made.append(len(made))
            if len(made) > 2:
                raise DataError("the third is bad")
            return Batch(torch.zeros(1, 1), torch.zeros(1, 1))

        def state_dict(self):
            return {"made": len(made)}

        def load_state_dict(self, state):
            made.clear()

    ahead = Prefetcher(Counting(), CPU)
    ahead.next_batch()
    ahead._ahead[1].exception(timeout=10)  # made although nobody asked for it yet
    ahead.next_batch()
    with pytest.raises(DataError, match="the third is bad"):
        ahead.next_batch()
    for _ in range(10):
        allowed.release()
    ahead.load_state_dict({})
    assert ahead.state_dict() == {"made": 0}
    ahead.close()
