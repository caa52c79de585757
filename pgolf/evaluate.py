"""Scoring: bits per byte over a whole validation split, the sums in float64.

bpb = sum of nats / ln 2 / sum of bytes. Every token of the split but the very first is scored exactly once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.distributed import Ranks
from pgolf.model import Model
from pgolf.progress import progress
from pgolf.windows import ScoringBatches


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits a byte."""
        return self.nats / math.log(2.0) / self.bytes


@torch.inference_mode()
def evaluate(
    model: Model,
    tokens: Tensor,  # (count,) integer, the validation split
    token_bytes: Tensor,  # (count,) bytes of text each token stands for, given the one before it
    seq_len: int,
    batch_tokens: int,  # a forward pass
    ranks: Ranks,
    *,
    stride: int = 0,  # 0: seq_len
    bos_id: int | None = None,  # given: documents are scored alone
) -> Score:
    """Score `tokens` through the windows of pgolf/windows.py, which ranks share. The result is the same for every
    number of ranks, up to the order in which float64 numbers are added."""
    device = next(model.parameters()).device
    batches = ScoringBatches(tokens, seq_len, batch_tokens, stride, bos_id, ranks.rank, ranks.world_size)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch, scored in progress(batches, "scoring", len(batches), unit="batch"):
        inputs, targets, borders, longest = batch.to(device)
        losses = model.loss(inputs, targets, "none", borders, longest).flatten()
        nats += losses[scored.to(device)].double().sum()
        count += len(scored)
    totals = torch.stack((nats.cpu(), torch.tensor(count, dtype=torch.float64)))
    ranks.sum_(totals)
    return Score(nats=float(totals[0]), tokens=int(totals[1]), bytes=int(token_bytes[1:].sum()))


def log_probs(
    model: Model,
    tokens: Tensor,
    seq_len: int,
    batch_tokens: int,
    ranks: Ranks,
    *,
    stride: int = 0,
    bos_id: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `evaluate` scores, with the whole distribution: this rank's targets (n,) int64 in the order of the text and
    ln p (n, vocab_size) float32, on the model's device, a batch at a time. Ranks have consecutive parts of the text."""
    device = next(model.parameters()).device
    batches = ScoringBatches(tokens, seq_len, batch_tokens, stride, bos_id, ranks.rank, ranks.world_size)
    for batch, scored in progress(batches, "scoring", len(batches), unit="batch"):
        with torch.inference_mode():
            inputs, targets, borders, longest = batch.to(device)
            places = scored.to(device)
            logits = model(inputs, borders, longest).flatten(0, 1)[places]
            found = targets.flatten()[places], model.capped(logits).log_softmax(-1)
        yield found
