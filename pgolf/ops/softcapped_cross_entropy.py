"""Cross-entropy of soft-capped logits: the loss of every record.

    c    = softcap · tanh(logits / softcap)          |c| <= softcap
    loss = log Σ_v exp(c_v) - c_target               in nats, one for each token

Because the cap bounds every logit, exp never overflows for softcap < 88 in float32: no running maximum is needed.

Shapes and dtypes: logits (..., V) of any floating dtype, targets (...) int64 or int32. Losses are computed and
returned in float32 (float64 for float64 logits). Differentiable in logits, for whatever gradient arrives.
`reduction`: "mean" over the tokens that count, "sum", or "none" (the shape of targets). Tokens whose target is
`ignore_index` have loss 0, gradient 0, and do not count. If no token counts, "mean" is NaN, as in
`torch.nn.functional.cross_entropy`, and "sum" is 0.
Least traffic for T tokens: one read and one write of the logits for forward and backward together.
Errors: `TypeError`/`ValueError` as named; on the CPU a target outside 0..V-1 raises `ValueError` before anything
reads it (compiled: `RuntimeError`), on CUDA PyTorch's device-side assertion catches it.
Source: soft-capping, Gemma 2, arXiv 2408.00118.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks

REDUCTIONS = ("mean", "sum", "none")

backends.register("softcapped_cross_entropy")


def softcapped_cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float = 30.0, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Cross-entropy in nats of `softcap * tanh(logits / softcap)` against `targets`.

    Args:
        logits: (..., V), floating.
        targets: (...) int64 or int32, values 0..V-1 or `ignore_index`.
        softcap: bound of the capped logits, > 0.
        reduction: "mean", "sum" or "none".
        ignore_index: target value of tokens that do not count.
    Returns:
        A scalar, or (...) for "none"; float32 (float64 for float64 logits).
    """
    _check(logits, targets, softcap, reduction, ignore_index)
    _check_range(targets, logits.shape[-1], ignore_index)
    backends.choose("softcapped_cross_entropy", logits.device.type)
    return softcapped_cross_entropy_reference(logits, targets, softcap, reduction, ignore_index)


def softcapped_cross_entropy_reference(
    logits: Tensor, targets: Tensor, softcap: float = 30.0, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `softcapped_cross_entropy`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    capped = softcap * torch.tanh(logits.to(dtype) / softcap)  # (..., V)
    flat = capped.reshape(-1, capped.shape[-1])  # (T, V)
    losses = F.cross_entropy(
        flat, targets.reshape(-1).long(), reduction=reduction, ignore_index=ignore_index
    )  # () or (T,)
    return losses.reshape(targets.shape) if reduction == "none" else losses


def _check(logits: Tensor, targets: Tensor, softcap: float, reduction: str, ignore_index: int) -> None:
    checks.tensor("logits", logits, checks.FLOATS)
    checks.tensor("targets", targets, (torch.int64, torch.int32))
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not accepted; expected (..., V) with V >= 1")
    checks.shape("targets", targets, logits.shape[:-1], "logits without its last size")
    checks.same_device("logits", logits, targets=targets)
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: expected a float, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap} is not accepted; it must be positive and finite")
    checks.choice("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def _check_range(targets: Tensor, classes: int, ignore_index: int) -> None:
    if targets.device.type != "cpu":
        return  # a host check would synchronise; the device asserts
    good = (((targets >= 0) & (targets < classes)) | (targets == ignore_index)).all()
    message = f"targets: a value is outside 0..{classes - 1} and is not ignore_index {ignore_index}"
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(good, message)
    elif not good:
        bad = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)][0].item()
        raise ValueError(f"targets: value {bad} is not accepted; accepted are 0..{classes - 1} and {ignore_index}")
