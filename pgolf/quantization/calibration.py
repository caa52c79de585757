"""What quantization learns from text before it rounds: the second moments of every matrix's inputs.

From training batches seen by the trained model, inside the training budget.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pgolf import ops
from pgolf.data.batch import MicroBatch
from pgolf.errors import QuantizeError
from pgolf.model import LOOKED_UP, Model, role_of
from pgolf.runtime.ranks import Ranks


@torch.inference_mode()
def collect_hessians(
    model: Model, batches: Iterable[MicroBatch], ranks: Ranks, seconds_left: Callable[[], float]
) -> dict[str, Tensor]:
    """Sum of x^T x over the inputs x of every matrix: name -> (count, columns, columns) float32, on the CPU.

    Stops when a batch like the longest so far would not fit in `seconds_left()`; the first is always taken.
    """
    device = next(model.parameters()).device
    hessians = {
        name: torch.zeros(len(bank) if bank.ndim == 3 else 1, bank.size(-1), bank.size(-1), device=device)
        for name, bank in model.named_parameters()
        if role_of(name) != "control"
    }
    for name in LOOKED_UP:
        if name in hessians:  # all columns weigh the same
            hessians[name].copy_(torch.eye(hessians[name].size(-1)))
    seen, first = torch.empty(0), ("", 0)  # the last input, and which matrix had it first: q, k and v share theirs
    owners: dict[tuple[str, int], tuple[str, int]] = {}  # (name, index) -> the matrix whose sum is also this one's

    def observe(name: str, index: int, x: Tensor) -> None:
        nonlocal seen, first
        if x is not seen:
            seen, first = x, (name, index)
            ops.accumulate_hessian(hessians[name][index], x)
        owners[name, index] = first

    longest, before = 0.0, seconds_left()
    for batch in batches:
        inputs, _, cu_seqlens, max_seqlen = batch.to(device)
        model(inputs, cu_seqlens, max_seqlen, observe=observe)
        left = seconds_left()
        longest, before = max(longest, before - left), left
        if ranks.any(left < longest):
            break
    for (name, index), (owner, its_index) in owners.items():
        if (name, index) != (owner, its_index):
            hessians[name][index] = hessians[owner][its_index]
    ranks.sum_(*hessians.values())
    for name, hessian in hessians.items():
        if not hessian.isfinite().all():
            raise QuantizeError(f"{name}: the second moments of its inputs are not finite")
    return {name: hessian.cpu() for name, hessian in hessians.items()}
