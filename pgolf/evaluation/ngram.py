"""Scoring with a causal n-gram cache on top of the model: one pass, two scores.

The model's probabilities do not depend on the cache, so ranks compute them for their shares in any order, while the
first rank runs one cache over the whole stream from left to right in a thread: each target is scored by what the model
and all targets before it say, and then counted. What arrives early waits for its turn: the score is that of one rank.

"tilt" needs no such order: hints come from the tokens alone, and every rank computes all of them and tilts its share.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf.errors import ScoreError
from pgolf.evaluation.ngram_cache import LOWEST_LOGPROB, NgramCache, tilt
from pgolf.evaluation.scoring import Score, check_vocabulary, target_losses
from pgolf.model import Model
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings

BYTES_A_TOKEN = 80  # of memory: twice what English text takes
LEAST_MEMORY = 1 << 23


@dataclass(frozen=True)
class NgramConfig:
    mixing: str  # of MIXINGS in ngram_cache.py
    order: int  # the highest
    memory_bytes: int  # at most
    threshold: float  # of "tilt": a hint came true in this share of its cases, or no tilt
    boost: float  # of "tilt": what it adds to the hint's logit, in nats

    @classmethod
    def of(cls, settings: Settings, mixing: str | None = None) -> "NgramConfig":
        """Of a run; `mixing` in place of its own."""
        s, mixing = settings, mixing or settings.ngram
        order = s.ngram_order or (16 if mixing == "tilt" else 7)
        return cls(mixing, order, s.ngram_memory_bytes, s.ngram_threshold, s.ngram_boost)

    def new_cache(self, vocab_size: int, tokens: Tensor) -> NgramCache:
        """Sized for `tokens`, the first of which it knows."""
        cache = NgramCache(
            vocab_size,
            [self.order] if self.mixing == "tilt" else range(2, self.order + 1),
            self.mixing,
            min(self.memory_bytes, max(LEAST_MEMORY, BYTES_A_TOKEN * len(tokens))),
            threshold=self.threshold,
            boost=self.boost,
        )
        cache.update(tokens[:1])
        return cache


def evaluate_ngram(
    model: Model,
    tokens: Tensor,  # (count,) integer, the validation split
    token_bytes: Tensor,  # (count,) bytes of text each token stands for, given the one before it
    config: NgramConfig,
    seq_len: int,
    batch_tokens: int,  # a forward pass
    ranks: Ranks,
    *,
    stride: int = 0,  # 0: seq_len
    bos_id: int | None = None,  # given: documents are scored alone
) -> tuple[Score, Score]:
    """(the model's score, the score with the cache)."""

    def losses(others: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        return target_losses(model, tokens, seq_len, batch_tokens, ranks, others, stride=stride, bos_id=bos_id)

    check_vocabulary(model, tokens)
    vocab_size = model.config.vocab_size

    targets = tokens[1:].numpy()
    if config.mixing == "tilt":
        nats, mixed = _tilted(config.new_cache(vocab_size, tokens), targets, losses)
        totals = torch.tensor([nats, mixed], dtype=torch.float64)
        ranks.sum_(totals)
        nats, mixed = totals.tolist()
    else:
        arriving = gathered(((first, nats) for first, nats, _ in losses()), max(batch_tokens, seq_len), ranks)
        if ranks.first:
            nats, mixed = ranks.agree(*_in_order(config.new_cache(vocab_size, tokens), targets, arriving))
        else:
            for _ in arriving:
                pass
            nats, mixed = ranks.agree(0.0, 0.0)
    size = int(token_bytes[1:].sum())
    return Score(nats, len(targets), size), Score(mixed, len(targets), size)


def gathered(mine: Iterator[tuple[int, Tensor]], most: int, ranks: Ranks) -> Iterator[tuple[int, np.ndarray]]:
    """(first, values (n,) float64) of all ranks' `mine`, of at most `most` values each, on every rank.

    While a batch is on its way from the device and to the others, the next one is computed.
    """
    sent = torch.zeros(most + 2, dtype=torch.float64)  # first, count, values
    received = torch.empty(ranks.world_size * (most + 2), dtype=torch.float64)
    batches = _on_host(mine)
    while True:
        first, values = next(batches, (0, torch.empty(0)))
        sent[0], sent[1] = first, len(values)
        sent[2 : 2 + len(values)] = values
        if ranks.world_size == 1:
            received.copy_(sent)
        else:
            ranks.begin_all_gather(received, sent).wait()
        if not received.isfinite().all():  # seen by all ranks alike, so none waits for another
            raise ScoreError("a token's loss is not finite: the model computes no finite numbers")
        rows = received.view(ranks.world_size, -1)
        counts = rows[:, 1].long().tolist()
        if not any(counts):
            return
        for row, count in zip(rows, counts, strict=True):
            if count:
                yield int(row[0]), row[2 : 2 + count].numpy().copy()


def _on_host(batches: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The same in the host's memory, each after the next one has been queued on the device."""
    waiting: tuple[int, Tensor, torch.cuda.Event | None] | None = None
    for first, values in batches:
        arrived = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            host = values
        if waiting:
            yield _arrived(*waiting)
        waiting = first, host, arrived
    if waiting:
        yield _arrived(*waiting)


def _arrived(first: int, values: Tensor, arrived: torch.cuda.Event | None) -> tuple[int, Tensor]:
    if arrived:
        arrived.synchronize()
    return first, values


def _in_order(
    cache: NgramCache, targets: np.ndarray, arriving: Iterator[tuple[int, np.ndarray]]
) -> tuple[float, float]:
    """Nats of the model and with the cache; parts that arrive before their turn are kept."""
    early: dict[int, np.ndarray] = {}
    scores: list[Future[np.ndarray]] = []
    at, nats = 0, 0.0
    with ThreadPoolExecutor(1) as worker:
        for first, losses in arriving:
            early[first] = losses
            while at in early:
                part = early.pop(at)
                nats += float(part.sum())
                scores.append(worker.submit(cache.score, targets[at : at + len(part)], _logprobs(part)))
                at += len(part)
        mixed = -sum(float(score.result().sum()) for score in scores)
    if at != len(targets):
        raise AssertionError(f"scored {at} of {len(targets)} targets")
    return nats, mixed


def _tilted(cache: NgramCache, targets: np.ndarray, losses) -> tuple[float, float]:
    """This rank's share of the nats of the model and with the tilt."""
    hints, gates = cache.hints(targets)
    beta = np.where(gates, cache.boost, 0.0)
    nats = mixed = 0.0
    for first, values, of_hints in losses(torch.from_numpy(hints.astype(np.int32))):
        here = slice(first, first + len(values))
        logp, logp_hint = (_logprobs(each.double().cpu().numpy()) for each in (values, of_hints))
        nats += float(values.double().sum())
        mixed -= float(tilt(logp, logp_hint, hints[here] == targets[here], beta[here]).sum())
    return nats, mixed


def _logprobs(losses: np.ndarray) -> np.ndarray:
    """A float32 loss can be a rounding error below zero."""
    return np.clip(-losses, LOWEST_LOGPROB, 0.0)
