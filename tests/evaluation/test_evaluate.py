"""Scoring: every token once, the same result however windows are cut into batches or shared."""

import math

import pytest
import torch

from pgolf.errors import DataError, ScoreError
from pgolf.evaluation.scoring import Score, evaluate, target_losses
from pgolf.model import Model, ModelConfig
from pgolf.runtime.ranks import Ranks
from pgolf.settings import load_settings

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
BOS = 1


@pytest.fixture(scope="module")
def model():
    environ = {"PRESET": "demo", "MODEL_DIM": "32", "NUM_LAYERS": "2", "VOCAB_SIZE": "50", "SMEAR_GATE_ENABLED": "1"}
    model = Model(ModelConfig.of(load_settings(environ))).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # so that attention and SmearGate do something
        for parameter in (model.qo_bank, model.smear_gate, model.smear_lambda):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def make_tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(2, 50, (count,), generator=generator)
    tokens[torch.rand(count, generator=generator) < 0.05] = BOS
    return tokens, torch.randint(1, 6, (count,), generator=generator)


def nats_of(model: Model, row: torch.Tensor, new: int) -> float:
    """Of the last `new` targets of a row by itself."""
    return float(model.loss(row[None, :-1], row[None, 1:], reduction="none")[0, -new:].detach().double().sum())


@pytest.mark.parametrize(("count", "stride"), [(2, 0), (17, 0), (18, 0), (129, 0), (100, 16), (131, 5), (77, 1)])
def test_sums_equal_a_plain_loop(model, count, stride):
    tokens, token_bytes = make_tokens(count)
    score = evaluate(model, tokens, token_bytes, 16, 64, ALONE, stride=stride)
    end = min(16, count - 1)
    nats = nats_of(model, tokens[: end + 1], end)
    while end < count - 1:
        new = min(stride or 16, count - 1 - end)
        end += new
        nats += nats_of(model, tokens[end - 16 : end + 1], new)
    assert score.tokens == count - 1
    assert score.bytes == int(token_bytes[1:].sum())
    assert math.isclose(score.nats, nats, rel_tol=1e-5)
    assert math.isclose(score.bpb, nats / math.log(2) / score.bytes, rel_tol=1e-5)
    assert math.isclose(score.loss, nats / (count - 1), rel_tol=1e-5)


def test_a_token_that_the_model_does_not_know_is_named(model):
    tokens, token_bytes = make_tokens(50)
    tokens[7] = 50
    with pytest.raises(DataError, match="has token 50, the model knows 50"):
        evaluate(model, tokens, token_bytes, 16, 64, ALONE)


def test_a_model_that_computes_no_numbers_has_no_score(model):
    tokens, token_bytes = make_tokens(50)
    broken = Model(model.config).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        broken.embedding.fill_(3e38)
        broken.attn_scale.fill_(torch.nan)
    with pytest.raises(ScoreError, match="the loss over 49 tokens is nan"):
        evaluate(broken, tokens, token_bytes, 16, 64, ALONE)
    with pytest.raises(ScoreError, match="is inf"):
        Score(nats=math.inf, tokens=3, bytes=3)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_each_document_scores_as_it_does_alone(model, batch_tokens):
    tokens, token_bytes = make_tokens(300)
    starts = sorted({0, *(tokens[:-1] == BOS).nonzero()[:, 0].tolist()})
    nats = sum(
        nats_of(model, tokens[a : b + 1], b - a) for a, b in zip(starts, [*starts[1:], len(tokens) - 1], strict=True)
    )
    score = evaluate(model, tokens, token_bytes, 400, batch_tokens, ALONE, bos_id=BOS)
    assert score.tokens == 299
    assert math.isclose(score.nats, nats, rel_tol=1e-5)


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_more_context_and_other_batches_change_little(model, bos_id):
    tokens, token_bytes = make_tokens(200)
    scores = [
        evaluate(model, tokens, token_bytes, 16, batch, ALONE, stride=4, bos_id=bos_id).nats
        for batch in (1, 16, 48, 4096)
    ]
    assert max(scores) - min(scores) < 1e-3
    assert all(math.isfinite(score) for score in scores)


@pytest.mark.parametrize(("stride", "bos_id"), [(0, None), (3, None), (5, BOS)])
def test_the_number_of_processes_does_not_matter(model, monkeypatch, stride, bos_id):
    tokens, token_bytes = make_tokens(331)

    def score(ranks: Ranks):
        return evaluate(model, tokens, token_bytes, 16, 64, ranks, stride=stride, bos_id=bos_id)

    whole = score(ALONE)
    monkeypatch.setattr(Ranks, "sum_", lambda self, *tensors: None)
    for world_size in (2, 3, 16):
        parts = [score(Ranks(rank, world_size, CPU)) for rank in range(world_size)]
        assert sum(part.tokens for part in parts) == whole.tokens
        assert math.isclose(sum(part.nats for part in parts), whole.nats, rel_tol=1e-12)


@pytest.mark.parametrize(("stride", "bos_id"), [(0, None), (4, None), (0, BOS), (4, BOS)])
def test_losses_of_targets_and_of_others(model, stride, bos_id):
    tokens, token_bytes = make_tokens(150)
    arguments = {"seq_len": 16, "batch_tokens": 50, "stride": stride, "bos_id": bos_id}
    others = torch.randint(int(tokens.max()) + 1, (149,))
    found = [part for rank in range(2) for part in target_losses(model, tokens, ranks=Ranks(rank, 2, CPU), **arguments)]
    found.sort(key=lambda part: part[0])
    assert [first for first, *_ in found] == [
        0,
        *torch.tensor([len(part[1]) for part in found]).cumsum(0)[:-1].tolist(),
    ]
    whole = torch.cat([losses for _, losses, _ in found])
    nats = float(whole.double().sum())
    assert math.isclose(nats, evaluate(model, tokens, token_bytes, ranks=ALONE, **arguments).nats, rel_tol=1e-9)
    given = list(target_losses(model, tokens, ranks=ALONE, others=others, **arguments))
    of_others = torch.cat([each for _, _, each in given])
    hit = others == tokens[1:]
    torch.testing.assert_close(of_others[hit], whole[hit])
    again = target_losses(model, tokens, ranks=ALONE, others=tokens[1:], **arguments)
    torch.testing.assert_close(torch.cat([each for _, _, each in again]), whole)


@pytest.mark.parametrize(
    ("count", "wrong", "named"),
    [
        (1, {}, r"tokens: shape \(1,\) is not accepted"),
        (9, {"token_bytes": torch.ones(8)}, r"token_bytes: shape \(8,\), expected \(9,\)"),
        (9, {"seq_len": 0}, "seq_len: 0 is not accepted"),
        (9, {"stride": 17}, "stride: 17 is not accepted"),  # tokens between two windows would not be scored
        (9, {"batch_tokens": 0}, "batch_tokens: 0 is not accepted"),
    ],
)
def test_arguments_that_would_leave_tokens_out_are_refused_by_name(model, count, wrong, named):
    tokens, token_bytes = make_tokens(count)
    arguments = {"token_bytes": token_bytes, "seq_len": 16, "batch_tokens": 64, "ranks": ALONE, **wrong}
    with pytest.raises(ValueError, match=named):
        evaluate(model, tokens, **arguments)
