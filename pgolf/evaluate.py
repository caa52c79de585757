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
    nats = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    count = 0
    for _, losses, _ in target_losses(model, tokens, seq_len, batch_tokens, ranks, stride=stride, bos_id=bos_id):
        nats += losses.double().sum()
        count += len(losses)
    totals = torch.stack((nats.cpu(), torch.tensor(count, dtype=torch.float64)))
    ranks.sum_(totals)
    return Score(nats=float(totals[0]), tokens=int(totals[1]), bytes=int(token_bytes[1:].sum()))


def target_losses(
    model: Model,
    tokens: Tensor,
    seq_len: int,
    batch_tokens: int,
    ranks: Ranks,
    others: Tensor | None = None,  # (count - 1,) integer: for each target another token, whose loss is wanted too
    *,
    stride: int = 0,
    bos_id: int | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """This rank's batches: the first target's number (0 for tokens[1]), nats of it and those that follow (n,), and of
    `others`, on the model's device. Together the ranks give every target once."""
    device = next(model.parameters()).device
    batches = ScoringBatches(tokens, seq_len, batch_tokens, stride, bos_id, ranks.rank, ranks.world_size)
    for batch, scored, first in progress(batches, "scoring", len(batches), unit="batch"):
        with torch.inference_mode():
            inputs, targets, borders, longest = batch.to(device)
            places = scored.to(device)
            logits = model(inputs, borders, longest)
            losses = model.loss_of(logits, targets, "none").flatten()[places]
            of_others = None
            if others is not None:
                wanted = targets.flatten().clone()
                wanted[places] = others[first : first + len(scored)].to(device, wanted.dtype)
                of_others = model.loss_of(logits, wanted.view_as(targets), "none").flatten()[places]
        yield first, losses, of_others
