"""Scoring: bits per byte over a whole validation split, the sums in float64.

bpb = sum of nats / ln 2 / sum of bytes. Every token of the split but the very first is a target exactly once.
"""

import itertools
import math
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


@torch.inference_mode()
def evaluate(
    model: Model,
    tokens: Tensor,  # (count,) integer, the validation split
    token_bytes: Tensor,  # (count,) bytes of text each token stands for, given the one before it
    seq_len: int,
    batch_tokens: int,
    ranks: Ranks,
) -> Score:
    """Score `tokens` in rows of `seq_len` targets, the shorter tail included; ranks share the rows."""
    device = next(model.parameters()).device
    rows_at_once = max(1, batch_tokens // seq_len)
    full_rows, tail = divmod(len(tokens) - 1, seq_len)
    batches = -(-full_rows // rows_at_once) + (tail > 0)
    mine = itertools.islice(sequential_rows(tokens, seq_len, rows_at_once), ranks.rank, None, ranks.world_size)
    total = len(range(ranks.rank, batches, ranks.world_size))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for inputs, targets in progress(mine, "scoring", total, unit="batch"):
        losses = model.loss(inputs.to(device), targets.to(device), reduction="none")
        nats += losses.double().sum()
        count += targets.numel()
    totals = torch.stack((nats.cpu(), torch.tensor(count, dtype=torch.float64)))
    ranks.sum_(totals)
    return Score(nats=float(totals[0]), tokens=int(totals[1]), bytes=int(token_bytes[1:].sum()))
