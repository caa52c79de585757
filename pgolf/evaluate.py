"""Scoring: bits per byte over a whole validation split, the sums in float64.

bpb = sum of nats / ln 2 / sum of bytes. Every token of the split but the very first is a target exactly once.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.data.loader import sequential_rows
from pgolf.distributed import Ranks
from pgolf.model import Model
from pgolf.progress import progress


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
    batch_tokens: int,
    ranks: Ranks,
) -> Score:
    """Score `tokens` in rows of `seq_len` targets, the shorter tail included; ranks share the rows."""
    nats = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    count = 0
    for _, losses, _ in target_losses(model, tokens, seq_len, batch_tokens, ranks):
        nats += losses.double().sum()
        count += losses.numel()
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
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """This rank's batches: the first target's number (0 for tokens[1]), nats of it and those that follow (n,), and of
    `others`, on the model's device. Together the ranks give every target once."""
    device = next(model.parameters()).device
    rows_at_once = max(1, batch_tokens // seq_len)
    full_rows, tail = divmod(len(tokens) - 1, seq_len)
    batches = range(-(-full_rows // rows_at_once) + (tail > 0))[ranks.rank :: ranks.world_size]
    mine = itertools.islice(sequential_rows(tokens, seq_len, rows_at_once), ranks.rank, None, ranks.world_size)
    for index, (inputs, targets) in zip(batches, progress(mine, "scoring", len(batches), unit="batch"), strict=True):
        first = min(index * rows_at_once, full_rows) * seq_len
        with torch.inference_mode():
            logits = model(inputs.to(device))
            losses = model.loss_of(logits, targets.to(device), reduction="none").flatten()
            of_others = None
            if others is not None:
                wanted = others[first : first + targets.numel()].long().view_as(targets)
                of_others = model.loss_of(logits, wanted.to(device), reduction="none").flatten()
        yield first, losses, of_others
