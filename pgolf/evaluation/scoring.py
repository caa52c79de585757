"""Scoring: bits per byte over a whole validation split, the sums in float64.

bpb = sum of nats / ln 2 / sum of bytes. Every token of the split but the very first is scored exactly once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.errors import DataError, ScoreError
from pgolf.evaluation.windows import ScoringBatches
from pgolf.model import Model
from pgolf.ops import checks
from pgolf.runtime.progress import progress
from pgolf.runtime.ranks import Ranks


@dataclass(frozen=True)
class Score:
    """What `evaluate` found, over all ranks.

        bpb = nats / ln 2 / bytes

    Attributes:
        nats: sum of the natural log-losses of all targets.
        tokens: targets scored.
        bytes: of text that they stand for.
    Raises:
        ScoreError: nats that are infinite or not a number.
        ZeroDivisionError: `loss` and `bpb` where nothing was scored.
    Example:
        >>> import math
        >>> from pgolf.evaluation.scoring import Score
        >>> score = Score(nats=8 * math.log(2), tokens=4, bytes=16)
        >>> round(score.bpb, 6), round(score.loss / math.log(2), 6)
        (0.5, 2.0)

    Source: bits per byte as the challenge scores its entries.
    """

    nats: float
    tokens: int
    bytes: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.nats):
            raise ScoreError(f"the loss over {self.tokens} tokens is {self.nats}: the model computes no finite numbers")

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
    """Score a validation split: the loss of every token but the first, once, summed in float64.

        nats = Σ_t -ln p(token_t | the tokens before it in its window),   bpb = nats / ln 2 / Σ_t bytes of token_t

    The windows are those of pgolf/evaluation/windows.py, which ranks share; the result is the same for every number of
    ranks, up to the order in which float64 numbers are added.

    Args:
        model: a `pgolf.model.Model`, on any device.
        tokens: (count,) integers on the CPU, the validation split.
        token_bytes: (count,) integers, bytes of text that each token stands for, given the one before it.
        seq_len: tokens of context at most, >= 1.
        batch_tokens: of a forward pass, at most, but for a single longer window.
        ranks: this process among those that share the work.
        stride: tokens that each further window scores, at most seq_len; 0: seq_len, without overlap.
        bos_id: the token that begins a document; given, documents are scored alone.
    Returns:
        A `Score`: nats, tokens and bytes; `bpb` is the challenge's number.
    Raises:
        TypeError: a wrong type.
        ValueError: a shape or number that does not fit; a token outside the model's vocabulary.
        ScoreError: losses that are not finite; on all ranks.
    Example:
        >>> import torch
        >>> from pgolf.runtime.ranks import Ranks
        >>> from pgolf.evaluation.scoring import evaluate
        >>> from pgolf.model import Model, ModelConfig
        >>> from pgolf.settings import load_settings
        >>> settings = load_settings({"PRESET": "demo", "MODEL_DIM": "64", "NUM_LAYERS": "2", "VOCAB_SIZE": "64"})
        >>> model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(0))
        >>> alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        >>> score = evaluate(model, torch.arange(100) % 64, torch.ones(100), seq_len=32, batch_tokens=64, ranks=alone)
        >>> score.tokens, score.bytes, score.bpb > 0
        (99, 99, True)

    Source: bits per byte as the challenge scores its entries.
    """
    _check(tokens, token_bytes, seq_len, batch_tokens, stride)
    nats = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    count = 0
    for _, losses, _ in target_losses(model, tokens, seq_len, batch_tokens, ranks, stride=stride, bos_id=bos_id):
        nats += losses.double().sum()
        count += len(losses)
    totals = torch.stack((nats.cpu(), torch.tensor(count, dtype=torch.float64)))
    ranks.sum_(totals)
    return Score(nats=float(totals[0]), tokens=int(totals[1]), bytes=int(token_bytes[1:].sum()))


def _check(tokens: Tensor, token_bytes: Tensor, seq_len: int, batch_tokens: int, stride: int) -> None:
    checks.tensor("tokens", tokens)
    checks.tensor("token_bytes", token_bytes)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)} is not accepted; expected (count,), at least 2")
    checks.shape("token_bytes", token_bytes, tuple(tokens.shape), "one for each token")
    checks.integer("seq_len", seq_len, 1, 1 << 40)
    checks.integer("batch_tokens", batch_tokens, 1, 1 << 40)
    checks.integer("stride", stride, 0, seq_len)  # a longer one would leave tokens out


def check_vocabulary(model: Model, tokens: Tensor) -> None:
    """`DataError` for a token that the model does not know, for which a GPU would end the process."""
    most = int(tokens.max())
    if most >= model.config.vocab_size:
        raise DataError(f"the text to score has token {most}, the model knows {model.config.vocab_size}")


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
    check_vocabulary(model, tokens)
    device = next(model.parameters()).device
    batches = ScoringBatches(tokens, seq_len, batch_tokens, stride, bos_id, ranks.rank, ranks.world_size)
    for batch, scored, first in progress(batches, "scoring", len(batches), unit="batch"):
        with torch.inference_mode():
            inputs, targets, cu_seqlens, longest = batch.to(device)
            places = scored.to(device)
            logits = model(inputs, cu_seqlens, longest)
            losses = model.loss_of(logits, targets, "none").flatten()[places]
            of_others = None
            if others is not None:
                wanted = targets.flatten().clone()
                wanted[places] = others[first : first + len(scored)].to(device, wanted.dtype)
                of_others = model.loss_of(logits, wanted.view_as(targets), "none").flatten()[places]
        yield first, losses, of_others
