"""Scoring: every token once, the tail included, the same result however the rows are cut or shared."""

import math

import pytest
import torch

from pgolf.distributed import Ranks
from pgolf.evaluate import evaluate
from pgolf.model import Model, ModelConfig
from pgolf.settings import load_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    environ = {"PRESET": "demo", "MODEL_DIM": "32", "NUM_LAYERS": "2", "VOCAB_SIZE": "50"}
    config = ModelConfig.of(load_settings(environ))
    return Model(config).initialise(torch.Generator().manual_seed(0))


def make_tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(50, (count,), generator=generator), torch.randint(1, 6, (count,), generator=generator)


@pytest.mark.parametrize("count", [2, 16, 17, 18, 100, 129])
def test_sums_equal_a_plain_loop(model, count):
    tokens, token_bytes = make_tokens(count)
    score = evaluate(model, tokens, token_bytes, 16, 64, Ranks(0, 1, CPU))
    nats = 0.0
    for start in range(0, count - 1, 16):
        row = tokens[start : start + 17].long()
        losses = model.loss(row[None, :-1], row[None, 1:], reduction="none").detach()
        nats += float(losses.double().sum())
    assert score.tokens == count - 1
    assert score.bytes == int(token_bytes[1:].sum())
    assert math.isclose(score.nats, nats, rel_tol=1e-6)
    assert math.isclose(score.bpb, nats / math.log(2) / score.bytes, rel_tol=1e-6)
    assert math.isclose(score.loss, nats / (count - 1), rel_tol=1e-6)


def test_batch_size_does_not_matter(model):
    tokens, token_bytes = make_tokens(200)
    scores = [evaluate(model, tokens, token_bytes, 16, batch, Ranks(0, 1, CPU)).nats for batch in (1, 16, 48, 4096)]
    assert max(scores) - min(scores) < 1e-3
    assert all(math.isfinite(score) for score in scores)


def test_the_shares_of_the_ranks_add_up(model, monkeypatch):
    tokens, token_bytes = make_tokens(331)
    whole = evaluate(model, tokens, token_bytes, 16, 32, Ranks(0, 1, CPU))
    monkeypatch.setattr(Ranks, "sum_", lambda self, *tensors: None)
    for world_size in (2, 3, 16):
        parts = [evaluate(model, tokens, token_bytes, 16, 32, Ranks(r, world_size, CPU)) for r in range(world_size)]
        assert sum(part.tokens for part in parts) == whole.tokens
        assert math.isclose(sum(part.nats for part in parts), whole.nats, rel_tol=1e-6)
