"""The output layer and its loss in one, logits never whole in memory.

"mean" and "sum" make both gradients in the forward, for a factor of 1 a token; the backward multiplies them by what
arrives. "none" computes the chunks again in the backward, since each token has a factor of its own. Saved for the
backward: nothing of T x V values. Chunks fill half of the L2 on CUDA, about 2 MB on the CPU.

Bytes at the record's shape (98,304 tokens, V 8192, D 512, bfloat16), each tensor once for each operation:
    this, if chunks stay in the L2: hidden, weight in; d hidden, d weight (float32) out; targets, losses    0.23 GB
    apart: three matrix products, and a loss that reads and writes the logits once                          8.38 GB
FLOPs are the same: 6·T·V·D, 2.47e12.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.softcapped_cross_entropy import (
    check_arguments,
    check_range,
    compute,
    refuse_second_derivative,
    softcapped_cross_entropy_reference,
)

_OP = "linear_softcapped_cross_entropy"
_CPU_CHUNK_BYTES = 2 << 20

backends.register(_OP, triton=("cuda",))


def linear_softcapped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 30.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy in nats of soft-capped `hidden @ weight.T`, the logits never whole in memory.

        logits = hidden weightᵀ                              a chunk of rows at a time, in one buffer
        loss   = softcapped_cross_entropy(logits, targets)   the buffer becomes g = d loss / d logits, in place
        d hidden = g weight,    d weight = Σ over chunks gᵀ hidden

    Logits and g are rounded to the dtype of hidden, as they are where the layer stands alone; d weight is summed over
    the chunks in float32. Differentiable in hidden and weight, once. What is said of tokens that do not count holds as
    for `softcapped_cross_entropy`.

    Args:
        hidden: (..., D), floating.
        weight: (V, D), the dtype of hidden (autocast casts both).
        targets: (...) int64 or int32, values 0..V-1 or `ignore_index`.
        softcap: bound of the capped logits, > 0.
        reduction: "mean" over the tokens that count, "sum" or "none".
        ignore_index: target value of tokens that do not count.
    Returns:
        A scalar, or (...) for "none"; float32 (float64 for float64 inputs), in nats.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device, number or name that does not fit; on the CPU a target outside 0..V-1.
        RuntimeError: a backward with `create_graph=True`.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> hidden, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> ops.linear_softcapped_cross_entropy(hidden, weight, torch.randint(100, (2, 8))).backward()
        >>> hidden.grad.shape, weight.grad.shape
        (torch.Size([2, 8, 16]), torch.Size([100, 16]))

    Source: head and loss in chunks, Hsu et al., Liger Kernel, arXiv 2410.10989; soft-capping, Gemma 2, arXiv
    2408.00118.
    """
    _check(hidden, weight, targets)
    check_arguments(softcap, reduction, ignore_index)
    check_range(targets, weight.shape[0], ignore_index)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    wants_hidden, wants_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    if reduction == "none" or not (wants_hidden or wants_weight):
        losses = _losses(flat, weight, flat_targets, float(softcap), ignore_index)
        if reduction == "none":
            return losses.reshape(targets.shape)
        total = losses.sum()
    else:
        total = _total(flat, weight, flat_targets, float(softcap), ignore_index, wants_hidden, wants_weight)[0]
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)  # so the gradient of no tokens is 0, not NaN


def linear_softcapped_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 30.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `linear_softcapped_cross_entropy`."""
    return softcapped_cross_entropy_reference(F.linear(hidden, weight), targets, softcap, reduction, ignore_index)


@torch.library.custom_op("pgolf::linear_softcapped_cross_entropy", mutates_args=())
def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> Tensor:
    """losses (T,) of hidden (T, D); the backward computes the logits again."""
    return _compute(hidden, weight, targets, softcap, ignore_index)[0]


@_losses.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden))


@torch.library.custom_op("pgolf::linear_softcapped_cross_entropy_gradient", mutates_args=())
def _gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    softcap: float,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d hidden and d weight (float32) of Σ scale·losses, scale (T,); empty where not wanted. Not differentiable."""
    return _compute(hidden, weight, targets, softcap, ignore_index, scale, wants_hidden, wants_weight)[1:]


@_gradient.register_fake
def _(hidden, weight, targets, scale, softcap, ignore_index, wants_hidden, wants_weight):
    return _empty_gradients(hidden, weight, wants_hidden, wants_weight)


@torch.library.custom_op("pgolf::linear_softcapped_cross_entropy_total", mutates_args=())
def _total(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, its d hidden, and its d weight in float32; a gradient not wanted is empty."""
    scale = torch.ones(1, dtype=_wide(hidden), device=hidden.device)
    losses, d_hidden, d_weight = _compute(
        hidden, weight, targets, softcap, ignore_index, scale, wants_hidden, wants_weight
    )
    return losses.sum(), d_hidden, d_weight


@_total.register_fake
def _(hidden, weight, targets, softcap, ignore_index, wants_hidden, wants_weight):
    return hidden.new_empty((), dtype=_wide(hidden)), *_empty_gradients(hidden, weight, wants_hidden, wants_weight)


def _save_inputs(ctx, inputs, output) -> None:
    hidden, weight, targets, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _backward_of_losses(ctx, grad: Tensor):
    refuse_second_derivative(_OP)
    hidden, weight, targets = ctx.saved_tensors
    wants = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _gradient(hidden, weight, targets, grad, ctx.softcap, ctx.ignore_index, *wants)
    return d_hidden if wants[0] else None, d_weight.to(weight.dtype) if wants[1] else None, None, None, None


_losses.register_autograd(_backward_of_losses, setup_context=_save_inputs)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.wants, ctx.weight_dtype = inputs[-2:], inputs[1].dtype
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)


def _backward_of_total(ctx, grad: Tensor, *_):
    refuse_second_derivative(_OP)
    d_hidden, d_weight = ctx.saved_tensors
    wants_hidden, wants_weight = ctx.wants
    return (
        (d_hidden.to(grad.dtype) * grad).to(d_hidden.dtype) if wants_hidden else None,
        (d_weight * grad).to(ctx.weight_dtype) if wants_weight else None,
        *(None,) * 5,
    )


_total.register_autograd(_backward_of_total, setup_context=_save_gradients)


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    scale: Tensor | None = None,
    wants_hidden: bool = False,
    wants_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses (T,) and, for `scale` (T,) or (1,), d hidden (T, D) and d weight (V, D) float32 of Σ scale·losses."""
    _check(hidden, weight, targets)  # again: the registered operations can be called without the public function
    rows, classes = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(rows, dtype=_wide(hidden))
    d_hidden, d_weight = _empty_gradients(hidden, weight, wants_hidden, wants_weight)
    d_weight.zero_()
    step = min(_chunk_rows(hidden, classes), max(rows, 1))
    buffer = hidden.new_empty(step, classes)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            chunk = hidden[part]
            logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])
            factor = scale if scale is None or scale.numel() == 1 else scale[part]
            gradient = None if scale is None else logits
            losses[part] = compute(logits, targets[part], softcap, ignore_index, factor, gradient, op=_OP)
            if wants_hidden:
                torch.mm(logits, weight, out=d_hidden[part])
            if wants_weight:
                _add_product(d_weight, logits.t(), chunk)
    return losses, d_hidden, d_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the sum and the product are float32 whatever the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _chunk_rows(hidden: Tensor, classes: int) -> int:
    """Rows whose logits take half of the L2 of a GPU, or some megabytes on the CPU."""
    limit = _CPU_CHUNK_BYTES
    if hidden.device.type == "cuda":
        limit = torch.cuda.get_device_properties(hidden.device).L2_cache_size // 2
    rows = max(limit // (classes * hidden.element_size()), 1)
    return rows // 128 * 128 or rows  # whole tiles of the matrix products


def _empty_gradients(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape if wants_weight else 0, dtype=_wide(weight)),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    checks.tensor("hidden", hidden, checks.FLOATS)
    checks.tensor("weight", weight, checks.FLOATS)
    checks.tensor("targets", targets, (torch.int64, torch.int32))
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} is not accepted; expected (..., D) with D >= 1")
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) with V >= 1")
    checks.shape("targets", targets, hidden.shape[:-1], "hidden without its last size")
    checks.same_device("hidden", hidden, weight=weight, targets=targets)
    checks.same_dtype("hidden", hidden, weight=weight)
