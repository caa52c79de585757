"""What training minimises: the mean cross-entropy of the next token, or one of its variants.

- with a byte table (BYTE_WEIGHTED_LOSS) each token's loss counts by the bytes of text it stands for; one without bytes
  counts as one, for its nats are scored as well.
- `ahead` tokens (MTP_TOKENS): the same logits are also asked for the tokens after the next one, at a weight that falls
  from `weight` to 0 over the budget (as in modded-nanogpt; no parameters of its own). Nothing is asked of a document
  about the one after it, but its BOS.

What is minimised and logged as train_loss then differs from what is scored.
"""

import torch
from torch import Tensor, nn

from pgolf import ops
from pgolf.data.tokenizer import ByteTable
from pgolf.model import Model


class TrainingLoss(nn.Module):
    """(inputs, targets (rows, length), cu_seqlens, max_seqlen) -> the mean loss in float32, a scalar."""

    def __init__(self, model: Model, ahead: int = 0, weight: float = 0.0, byte_table: ByteTable | None = None):
        super().__init__()
        self.model = model
        self.ahead, self.weight = ahead, weight
        self.ahead_weight = torch.full((), self.weight, device=model.embedding.device)
        self.table = byte_table.to(model.embedding.device) if byte_table else None

    def set_progress(self, used: float) -> None:
        """The fraction of the budget that is used. The host does not wait for the device."""
        if self.ahead:
            self.ahead_weight.fill_((1.0 - used) * self.weight)

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> Tensor:
        if not self.ahead and self.table is None:
            return self.model.loss(inputs, targets, "mean", cu_seqlens, max_seqlen)
        logits = self.model(inputs, cu_seqlens, max_seqlen)
        weights = torch.ones_like(targets, dtype=torch.float32)
        if self.table is not None:
            weights = self.table.count(targets, inputs).clamp(min=1).float()
        loss = self._mean(logits, targets, weights)
        within = torch.ones_like(weights)
        bos_id = self.model.config.bos_id
        for step in range(1, self.ahead + 1):
            if step < targets.size(1):
                within = within[:, :-1] * (targets[:, step - 1 : -1] != bos_id)
                part = self._mean(logits[:, :-step].contiguous(), targets[:, step:], weights[:, step:] * within)
                loss = loss + self.ahead_weight * part
        return loss

    def _mean(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses = ops.softcapped_cross_entropy(logits, targets.contiguous(), self.model.config.logit_softcap, "none")
        return (losses * weights).sum() / weights.sum().clamp(min=1)
