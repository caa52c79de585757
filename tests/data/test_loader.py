import numpy as np
import pytest
import torch

from pgolf.data.loader import TokenLoader
from pgolf.data.shards import write_shard
from pgolf.errors import DataError, UserError


def make_shards(folder, *sizes: int, vocab_size: int = 50_000) -> list:
    """Shards whose tokens count up over all of them, so that a token tells where it stood."""
    paths, start = [], 0
    for index, size in enumerate(sizes):
        paths.append(folder / f"x_train_{index:06d}.bin")
        write_shard(paths[-1], np.arange(start, start + size) % vocab_size)
        start += size
    return paths


def take(loader: TokenLoader, batches: int) -> torch.Tensor:
    return torch.cat([loader.next_batch()[0] for _ in range(batches)])


def test_shapes_and_targets(tmp_path):
    loader = TokenLoader(make_shards(tmp_path, 100, 57), seq_len=8, batch_tokens=32, seed=1)
    inputs, targets, starts = loader.next_batch()
    assert starts is None
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)  # within one shard, one token later


@pytest.mark.parametrize("order", ["shuffled", "coprime"])
def test_an_epoch_shows_each_target_once_and_drops_no_window(tmp_path, order):
    sizes, seq_len = (100, 9, 8, 57), 8  # the third holds no window
    loader = TokenLoader(make_shards(tmp_path, *sizes), seq_len, batch_tokens=seq_len, seed=3, order=order)
    windows = loader._windows
    starts = take(loader, windows)[:, 0].tolist()
    assert loader.state_dict()["epoch"] == 0
    targets = [start + 1 + i for start in starts for i in range(seq_len)]
    assert len(targets) == len(set(targets))
    assert set(targets) <= {t for first, n in ((0, 100), (100, 9), (117, 57)) for t in range(first + 1, first + n)}
    assert sum(1 for start in starts if start == 100) == 1  # exactly one window fits the second shard
    assert windows >= (100 - 1) // 8 - 1 + 1 + (57 - 1) // 8 - 1
    take(loader, 1)
    assert loader.state_dict()["epoch"] == 1


def test_epochs_differ_in_order_and_phase(tmp_path):
    loader = TokenLoader(make_shards(tmp_path, 1000), 10, batch_tokens=10, seed=0)
    phases, orders = set(), set()
    for _ in range(6):
        starts = loader._take(loader._windows)[1].tolist()
        phases.add(min(starts))
        orders.add(tuple(starts))
        assert starts != sorted(starts)
        assert all((start - min(starts)) % 10 == 0 for start in starts)
        take(loader, 1)
        loader._position -= 1  # stand at the beginning of the epoch again
    assert len(phases) > 1
    assert len(orders) == 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_at_any_world_size(tmp_path, world_size):
    shards = make_shards(tmp_path, 300, 211)
    alone = TokenLoader(shards, 16, batch_tokens=128, seed=7)
    ranks = [TokenLoader(shards, 16, 128, 7, rank, world_size) for rank in range(world_size)]
    for _ in range(12):  # several epochs
        whole = alone.next_batch()
        parts = [rank.next_batch() for rank in ranks]
        assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
        assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_a_coprime_stride_takes_its_share_of_every_shard_in_every_batch(tmp_path):
    sizes = (1000, 3000, 500, 2500)
    loader = TokenLoader(make_shards(tmp_path, *sizes), 10, batch_tokens=320, seed=5, order="coprime")
    for _ in range(loader._windows // 32):
        first = loader.next_batch().inputs[:, 0]
        counts = torch.histc(first.float(), bins=14, min=0, max=7000).view(14)
        shares = [counts[:2].sum(), counts[2:8].sum(), counts[8:9].sum(), counts[9:].sum()]
        for share, size in zip(shares, sizes, strict=True):
            assert abs(float(share) - 32 * size / 7000) < 4
    assert loader.state_dict()["epoch"] == 0


def test_seeds_differ(tmp_path):
    shards = make_shards(tmp_path, 1000)
    first, again, other, negative = (take(TokenLoader(shards, 10, 100, seed), 3) for seed in (1, 1, 2, -1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, negative)


@pytest.mark.parametrize("batches", [0, 1, 5, 23])
def test_resuming_exactly_at_another_world_size(tmp_path, batches):
    shards = make_shards(tmp_path, 300, 211)
    alone = TokenLoader(shards, 16, batch_tokens=64, seed=7)
    take(alone, batches) if batches else None
    state = alone.state_dict()
    expected = take(alone, 9)
    ranks = [TokenLoader(shards, 16, 64, 7, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    resumed = torch.cat([torch.cat([rank.next_batch()[0] for rank in ranks]) for _ in range(9)])
    assert torch.equal(resumed, expected)


def test_a_state_of_other_data_is_refused(tmp_path):
    shards = make_shards(tmp_path, 300, 211)
    state = TokenLoader(shards, 16, 64, seed=7).state_dict()
    for loader, name in (
        (TokenLoader(shards, 16, 64, seed=8), "seed"),
        (TokenLoader(shards, 32, 64, seed=7), "seq_len"),
        (TokenLoader(shards[:1], 16, 64, seed=7), "shard_tokens"),
        (TokenLoader(shards, 16, 64, seed=7, order="coprime"), "loader"),
    ):
        with pytest.raises(DataError, match=f"{name} was"):
            loader.load_state_dict(state)


def test_little_data_repeats(tmp_path):
    loader = TokenLoader(make_shards(tmp_path, 9), 8, batch_tokens=80, seed=0)
    inputs = loader.next_batch().inputs
    assert torch.equal(inputs, torch.arange(8).expand(10, 8))


def test_too_little_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no training shard holds 9 tokens.*x_train_000000.bin has 8"):
        TokenLoader(make_shards(tmp_path, 8), 8, batch_tokens=8, seed=0)
    with pytest.raises(DataError, match="no training shard"):
        TokenLoader([], 8, batch_tokens=8, seed=0)
    with pytest.raises(DataError, match=r"x_train_000001.bin: no tokens"):
        TokenLoader(make_shards(tmp_path, 100, 0), 8, batch_tokens=8, seed=0)


def test_tokens_outside_the_vocabulary_are_refused_where_they_stand(tmp_path):
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[41] = 1024
    write_shard(tmp_path / "x_train_000000.bin", tokens)
    loader = TokenLoader([tmp_path / "x_train_000000.bin"], 10, batch_tokens=200, seed=0, vocab_size=1024)
    with pytest.raises(DataError, match=r"x_train_000000.bin: token 1024 at index 41, but the vocabulary has 1024"):
        loader.next_batch()
    TokenLoader([tmp_path / "x_train_000000.bin"], 10, 200, 0, vocab_size=1025).next_batch()


@pytest.mark.parametrize(
    ("seq_len", "batch_tokens", "rank", "world_size"),
    [(8, 12, 0, 1), (8, 8, 0, 2), (8, 0, 0, 1), (0, 8, 0, 1), (8, 16, 2, 2)],
)
def test_batches_that_do_not_divide_are_refused(tmp_path, seq_len, batch_tokens, rank, world_size):
    with pytest.raises(UserError):
        TokenLoader(make_shards(tmp_path, 100), seq_len, batch_tokens, 0, rank, world_size)
