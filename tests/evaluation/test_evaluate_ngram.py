"""Scoring with the n-gram cache: what the cache makes of the model's probabilities, alone and in several processes."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pgolf.errors import ScoreError
from pgolf.evaluation.ngram import NgramConfig, evaluate_ngram, gathered
from pgolf.evaluation.ngram_cache import NgramCache, tilt
from pgolf.evaluation.scoring import evaluate, target_losses
from pgolf.evaluation.windows import ScoringBatches
from pgolf.model import Model, ModelConfig
from pgolf.runtime.ranks import Ranks
from pgolf.settings import load_settings

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 707
MODES = ("adaptive", "pyp", "tilt")
BOS = 1
WINDOWS = [(0, None), (5, None), (0, BOS), (5, BOS)]  # stride, and BOS where documents are scored alone
WORLD_SIZES = (2, 3)


def config(mode: str) -> NgramConfig:
    order = {"NGRAM_ORDER": "4"} if mode == "tilt" else {}
    return NgramConfig.of(load_settings({"PRESET": "demo", "NGRAM": mode, **order}))


def model_and_data():
    environ = {"PRESET": "demo", "MODEL_DIM": "32", "NUM_LAYERS": "2", "VOCAB_SIZE": "50", "TRAIN_SEQ_LEN": "16"}
    model = Model(ModelConfig.of(load_settings(environ))).initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    phrases = torch.randint(2, 50, (6, 20), generator=generator)
    phrases[:2, 0] = BOS
    tokens = phrases[torch.randint(6, (40,), generator=generator)].flatten()[:COUNT]
    token_bytes = torch.randint(1, 6, (COUNT,), generator=generator)
    return model, SimpleNamespace(val_tokens=tokens.int(), val_token_bytes=token_bytes)


def scores(ranks: Ranks) -> list:
    """By the model alone, its windows cut in every way, and with the cache."""
    model, data = model_and_data()
    split = data.val_tokens, data.val_token_bytes
    alone = [evaluate(model, *split, 16, 48, ranks, stride=stride, bos_id=bos_id) for stride, bos_id in WINDOWS]
    return alone + [score for mode in MODES for score in evaluate_ngram(model, *split, config(mode), 16, 48, ranks)]


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_computes_no_numbers_has_no_score(mode):
    model, data = model_and_data()
    with torch.no_grad():
        model.attn_scale.fill_(torch.nan)
    with pytest.raises(ScoreError, match="the model computes no finite numbers"):
        evaluate_ngram(model, data.val_tokens, data.val_token_bytes, config(mode), 16, 48, ALONE)


def work(rank: int, folder: Path) -> None:
    """Process `rank` of the largest world, which is in the smaller ones too."""
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank < world_size:
            store = f"file://{folder}/store-{world_size}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            found = scores(Ranks(rank, world_size, torch.device("cpu")))
            torch.save(found, folder / f"{world_size}-{rank}.pt")
            dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_cache_on_the_models_probabilities(mode):
    model, data = model_and_data()
    base, mixed = evaluate_ngram(model, data.val_tokens, data.val_token_bytes, config(mode), 16, 48, ALONE)
    tokens, targets = data.val_tokens, data.val_tokens[1:].numpy()
    plain = evaluate(model, tokens, data.val_token_bytes, 16, 48, ALONE)
    assert (base.tokens, base.bytes) == (mixed.tokens, mixed.bytes) == (plain.tokens, plain.bytes)
    assert base.nats == pytest.approx(plain.nats, rel=1e-7)

    cache = NgramCache(50, [4] if mode == "tilt" else None, mode, 1 << 20)
    cache.update(tokens[:1])
    if mode == "tilt":
        hints, gates = cache.hints(targets)
        wanted = torch.from_numpy(hints.astype(int))
        parts = list(target_losses(model, tokens, 16, 48, ALONE, others=wanted))
        logp, of_hints = (-torch.cat([part[i] for part in parts]).double().numpy() for i in (1, 2))
        expected = tilt(logp, of_hints, hints == targets, np.where(gates, 2.625, 0.0))
        for first, losses, _ in parts:  # `others` are scored where the targets are
            again = next(p for p in target_losses(model, tokens, 16, 48, ALONE, others=tokens[1:]) if p[0] == first)
            assert torch.equal(again[1], losses)
            assert torch.equal(again[2], losses)
    else:
        losses = torch.cat([losses for _, losses, _ in target_losses(model, tokens, 16, 48, ALONE)])
        expected = cache.score(targets, -losses.double())
    assert mixed.nats == pytest.approx(-expected.sum(), rel=1e-9)
    assert mixed.bpb < base.bpb
    assert math.isfinite(mixed.loss)


def test_two_and_three_processes_give_the_score_of_one(tmp_path):
    _, data = model_and_data()
    assert (COUNT - 1) % 16, "the last window is a part of one"
    assert len(ScoringBatches(data.val_tokens, 16, 48)) % 6, "some rank has fewer batches"
    assert 5 < int((data.val_tokens == BOS).sum()) < COUNT // 16
    mp.spawn(work, (tmp_path,), nprocs=max(WORLD_SIZES))
    alone = scores(ALONE)
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            found = torch.load(tmp_path / f"{world_size}-{rank}.pt", weights_only=False)
            for one, several in zip(alone, found, strict=True):
                assert (several.tokens, several.bytes) == (one.tokens, one.bytes)
                assert several.nats == pytest.approx(one.nats, rel=1e-12)
                assert several.bpb == pytest.approx(one.bpb, abs=1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_parts_wait_for_their_turn(order):
    from pgolf.evaluation.ngram import _in_order

    rng = np.random.default_rng(0)
    targets, losses = rng.integers(5, size=400), rng.uniform(0.1, 3, 400)
    parts = [(100 * i, losses[100 * i : 100 * i + 100]) for i in order]
    cache = NgramCache(5, memory_bytes=1 << 20)
    expected = NgramCache(5, memory_bytes=1 << 20).score(targets, -losses)
    nats, mixed = _in_order(cache, targets, iter(parts))
    assert nats == pytest.approx(losses.sum())
    assert mixed == pytest.approx(-expected.sum(), rel=1e-12)
    with pytest.raises(AssertionError, match="scored 100 of 400"):
        _in_order(NgramCache(5, memory_bytes=1 << 20), targets, iter([parts[order.index(0)], parts[order.index(2)]]))


def test_what_one_rank_gathers_is_what_it_has():
    parts = [(0, torch.arange(5.0)), (5, torch.arange(3.0)), (8, torch.arange(1.0))]
    found = list(gathered(iter(parts), 5, ALONE))
    assert [(first, values.tolist()) for first, values in found] == [(f, v.tolist()) for f, v in parts]
