"""Cross-entropy of soft-capped logits: the loss of every record.

Because the cap bounds every logit, exp never overflows for softcap < 88 in float32: no running maximum is needed.

Least traffic for T tokens: one read and one write of the logits for forward and backward together. Eager "mean" and
"sum" reach it: the forward makes the gradient for a `grad_output` of 1, and the backward multiplies it in place unless
a number on the device says that it is 1. That rounds twice where the factor is no power of two, so float16, whose
gradients are scaled because they vanish, goes the other way: the backward reads the logits again. So do "none", and
compiled code, in which a saved tensor is never written in place. Each way saves one T x V tensor.
softcap > 64 and float64 are computed by plain PyTorch on every device; the Triton kernel has no such path.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks

REDUCTIONS = ("mean", "sum", "none")

_CACHED_VALUES = 1 << 18  # of a chunk on the CPU: two float32 buffers of this size stay in cache
_UNSHIFTED_SOFTCAP = 64.0  # exp(64) · 2^32 classes is finite in float32
_SMALLEST_SOFTCAP = 1e-30  # of the kernel: 2/softcap is finite

backends.register("softcapped_cross_entropy", triton=("cuda",))


def softcapped_cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float = 30.0, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Cross-entropy in nats of `softcap * tanh(logits / softcap)` against `targets`.

        c    = softcap · tanh(logits / softcap)          |c| <= softcap
        loss = log Σ_v exp(c_v) - c_target               in nats, one for each token
        d loss / d logits_v = (exp(c_v) / Σ exp(c) - [v = target]) · (1 - (c_v / softcap)²)

    Losses are computed in float32 (float64 for float64), within 1e-5 for logits of any dtype. Tokens whose target is
    `ignore_index` have loss 0, gradient 0, and do not count. If no token counts, "mean" is NaN, as in
    `torch.nn.functional.cross_entropy`, and "sum" is 0. Differentiable in logits, once.

    Args:
        logits: (..., V), floating.
        targets: (...) int64 or int32, values 0..V-1 or `ignore_index`.
        softcap: bound of the capped logits, > 0.
        reduction: "mean" over the tokens that count, "sum" or "none".
        ignore_index: target value of tokens that do not count.
    Returns:
        A scalar, or (...) for "none"; float32 (float64 for float64 logits), in nats.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device, number or name that does not fit; on the CPU a target outside 0..V-1, before
            anything reads it (compiled: `RuntimeError`; on CUDA the device asserts, and nothing out of bounds is read).
        RuntimeError: a backward with `create_graph=True`.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> logits, targets = torch.randn(2, 8, 100, requires_grad=True), torch.randint(100, (2, 8))
        >>> ops.softcapped_cross_entropy(logits, targets, softcap=30.0).backward()
        >>> logits.grad.shape
        torch.Size([2, 8, 100])
        >>> ops.softcapped_cross_entropy(logits, targets, reduction="none").shape
        torch.Size([2, 8])

    Source: soft-capping, Gemma 2, arXiv 2408.00118.
    """
    _check(logits, targets, softcap, reduction, ignore_index)
    check_range(targets, logits.shape[-1], ignore_index)
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    wanted = torch.is_grad_enabled() and logits.requires_grad and logits.dtype != torch.float16
    if reduction != "none" and wanted and not torch.compiler.is_compiling():
        return _total(flat, flat_targets, reduction == "mean", float(softcap), ignore_index)[0]
    losses = _losses(flat, flat_targets, float(softcap), ignore_index)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() / (targets != ignore_index).sum() if reduction == "mean" else losses.sum()


def softcapped_cross_entropy_reference(
    logits: Tensor, targets: Tensor, softcap: float | Tensor = 30.0, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `softcapped_cross_entropy`, but `softcap` as for `soft_cap`."""
    capped = soft_cap(logits.to(_wide(logits)), softcap)  # (..., V)
    flat = capped.reshape(-1, capped.shape[-1])  # (T, V)
    losses = F.cross_entropy(
        flat, targets.reshape(-1).long(), reduction=reduction, ignore_index=ignore_index
    )  # () or (T,)
    return losses.reshape(targets.shape) if reduction == "none" else losses


def soft_cap(z: Tensor, cap: float | Tensor) -> Tensor:
    """c tanh(z / c), of one cap or, asymmetrically (PR #1923), of two (2,): for z >= 0 and for z < 0."""
    if isinstance(cap, Tensor):
        cap = torch.where(z >= 0, cap[0], cap[1])
    return cap * torch.tanh(z / cap)


@torch.library.custom_op("pgolf::softcapped_cross_entropy", mutates_args=())
def _losses(logits: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> Tensor:
    """losses (T,) of logits (T, V); the backward computes them again, together with the gradient."""
    return compute(logits, targets, softcap, ignore_index)


@_losses.register_fake
def _(logits: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=_wide(logits))


@torch.library.custom_op("pgolf::softcapped_cross_entropy_gradient", mutates_args=())
def _gradient(
    logits: Tensor, targets: Tensor, scale: Tensor, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """losses (T,) and the gradient (T, V) of Σ scale·losses; scale (T,) or (1,). Not differentiable."""
    gradient = logits.new_empty(logits.shape)
    return compute(logits, targets, softcap, ignore_index, scale, gradient), gradient


@_gradient.register_fake
def _(logits: Tensor, targets: Tensor, scale: Tensor, softcap: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[:1], dtype=_wide(logits)), logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output) -> None:
    logits, targets, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets)


def _backward_of_losses(ctx, grad: Tensor):
    refuse_second_derivative("softcapped_cross_entropy")
    logits, targets = ctx.saved_tensors
    return _gradient(logits, targets, grad, ctx.softcap, ctx.ignore_index)[1], None, None, None


_losses.register_autograd(_backward_of_losses, setup_context=_save_logits)


@torch.library.custom_op("pgolf::softcapped_cross_entropy_total", mutates_args=())
def _total(logits: Tensor, targets: Tensor, mean: bool, softcap: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The sum or the mean of the losses, and its gradient (T, V), which is all that the backward needs."""
    gradient = logits.new_empty(logits.shape)
    scale = torch.ones(1, dtype=_wide(logits), device=logits.device)
    if mean:
        scale /= (targets != ignore_index).sum()
    losses = compute(logits, targets, softcap, ignore_index, scale, gradient)
    return losses.sum() * scale.squeeze() if mean else losses.sum(), gradient


@_total.register_fake
def _(logits: Tensor, targets: Tensor, mean: bool, softcap: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=_wide(logits)), logits.new_empty(logits.shape)


def _save_gradient(ctx, inputs, output) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


def _backward_of_total(ctx, grad: Tensor, _):
    refuse_second_derivative("softcapped_cross_entropy")
    (gradient,) = ctx.saved_tensors
    if _graph_is_kept() or type(gradient) is not Tensor:  # or is traced, and may be a result of the graph
        return (gradient.to(grad.dtype) * grad).to(gradient.dtype), None, None, None, None
    _rescale(gradient, grad)
    return gradient, None, None, None, None


_total.register_autograd(_backward_of_total, setup_context=_save_gradient)


def refuse_second_derivative(op: str) -> None:
    """The gradient is a constant to autograd, so a derivative of it would silently lack the loss."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: create_graph=True is not supported; {op}_reference can be differentiated twice")


def _graph_is_kept() -> bool:
    """Whether the backward that runs now may run again, and so needs what was saved as it is."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


@torch.library.custom_op("pgolf::rescale_", mutates_args=("gradient",))
def _rescale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a scalar of float32 (float64 for float64); where it is 1 the gradient is not touched."""
    if _uses_kernel("softcapped_cross_entropy", gradient, 1.0) and gradient.is_contiguous():
        from pgolf.triton_kernels.softcapped_cross_entropy import rescale

        rescale(gradient, factor)
    elif gradient.device.type != "cpu":
        gradient.copy_(gradient.to(factor.dtype) * factor)
    elif factor != 1:
        gradient.mul_(factor.item())  # a tensor would first be rounded to the dtype of the gradient


@_rescale.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


def compute(
    logits: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    scale: Tensor | None = None,
    gradient: Tensor | None = None,
    op: str = "softcapped_cross_entropy",
) -> Tensor:
    """losses (T,) and, written into `gradient` (T, V), the gradient of Σ scale·losses; scale (T,) or (1,).

    `gradient` may be `logits` itself, which is then lost. `op` is the operation whose backend is chosen.
    """
    _check_flat(logits, targets, scale)
    if not _uses_kernel(op, logits, softcap):
        return _compute_in_chunks(logits, targets, softcap, ignore_index, scale, gradient)
    from pgolf.triton_kernels.softcapped_cross_entropy import launch  # here, because triton is not on every machine

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    losses = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    scale = None if scale is None else scale.contiguous()
    launch(logits, targets.contiguous(), losses, softcap, ignore_index, scale, gradient)
    return losses


def _uses_kernel(op: str, logits: Tensor, softcap: float) -> bool:
    missing = ""
    if logits.dtype == torch.float64:
        missing = "float64"
    elif not _SMALLEST_SOFTCAP <= softcap <= _UNSHIFTED_SOFTCAP:
        missing = f"a softcap of {softcap:g}"
    return backends.choose(op, logits.device.type, missing) == "triton"


def _compute_in_chunks(
    logits: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    scale: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """`compute` in plain PyTorch, some rows at a time, so that what lies between reading and writing stays in cache."""
    rows, classes = logits.shape
    wide = _wide(logits)
    losses = logits.new_empty(rows, dtype=wide)
    values = _CACHED_VALUES if logits.device.type == "cpu" else _CACHED_VALUES << 6  # 2^24: few launches
    step = min(max(values // classes, 1), max(rows, 1))
    falls, weights = (logits.new_empty((step, classes), dtype=wide) for _ in range(2))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        ignored = (targets[part] == ignore_index).unsqueeze(1)  # (step, 1), as is all that is not r or w
        target = targets[part].long().unsqueeze(1).masked_fill(ignored, 0)
        r, w = falls[: len(target)], weights[: len(target)]
        _fall_and_exponent(logits[part], softcap, r, w)
        at_target = w.gather(1, target).double()
        total = w.exp2_().sum(1, keepdim=True)
        loss = (total.double().log2() - at_target) * math.log(2)
        losses[part] = loss.masked_fill_(ignored, 0).squeeze(1)
        if gradient is None:
            continue
        assert scale is not None
        w *= r.addcmul_(r, r, value=-1)  # a quarter of the slope
        # The target counts as much as all others together, so its slope must be exact where tanh is near 1.
        exact = torch.tanh(logits[part].gather(1, target).double() / softcap).square_().sub_(1) / 4
        w.scatter_add_(1, target, (total * exact).to(wide))
        w *= (scale if scale.numel() == 1 else scale[part]).unsqueeze(1) * 4 / total
        if logits.device.type != "cpu" or ignored.any():
            w.masked_fill_(ignored, 0)
        gradient[part] = w
    return losses


def _fall_and_exponent(logits: Tensor, softcap: float, r: Tensor, exponent: Tensor) -> None:
    """Fill r = (1 - tanh(logits / softcap)) / 2, from 1 down to 0, and log2(exp(capped logits)), shifted by the row."""
    top = softcap / math.log(2)
    r.copy_(logits)
    if softcap <= _UNSHIFTED_SOFTCAP:
        r.div_(-softcap / 2).sigmoid_()  # a tenth of the time of tanh
        torch.sub(r.new_full((), top), r, alpha=2 * top, out=exponent)
    else:
        r.div_(softcap).tanh_()
        torch.mul(r, top, out=exponent)
        exponent -= exponent.amax(1, keepdim=True)
        r.mul_(-0.5).add_(0.5)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_flat(logits: Tensor, targets: Tensor, scale: Tensor | None) -> None:
    # Again: the registered operations can be called without the public function.
    checks.tensor("logits", logits, checks.FLOATS)
    checks.tensor("targets", targets, (torch.int64, torch.int32))
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not accepted; expected (T, V) with V >= 1")
    checks.shape("targets", targets, logits.shape[:1], "one for each row of logits")
    checks.same_device("logits", logits, targets=targets)
    if scale is not None:
        checks.tensor("scale", scale, (_wide(logits),))
        checks.same_device("logits", logits, scale=scale)
        if scale.shape not in ((1,), targets.shape):
            raise ValueError(f"scale: shape {tuple(scale.shape)} is not accepted; expected (1,) or (T,)")


def _check(logits: Tensor, targets: Tensor, softcap: float, reduction: str, ignore_index: int) -> None:
    checks.tensor("logits", logits, checks.FLOATS)
    checks.tensor("targets", targets, (torch.int64, torch.int32))
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not accepted; expected (..., V) with V >= 1")
    checks.shape("targets", targets, logits.shape[:-1], "logits without its last size")
    checks.same_device("logits", logits, targets=targets)
    check_arguments(softcap, reduction, ignore_index)


def check_arguments(softcap: float, reduction: str, ignore_index: int) -> None:
    """What is not a tensor."""
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: expected a float, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap} is not accepted; it must be positive and finite")
    checks.choice("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def check_range(targets: Tensor, classes: int, ignore_index: int) -> None:
    """Targets on the CPU are in 0..classes-1 or `ignore_index`."""
    if targets.device.type != "cpu":
        return  # a host check would synchronise; the device asserts
    good = (((targets >= 0) & (targets < classes)) | (targets == ignore_index)).all()
    message = f"targets: a value is outside 0..{classes - 1} and is not ignore_index {ignore_index}"
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(good, message)
    elif not good:
        bad = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)][0].item()
        raise ValueError(f"targets: value {bad} is not accepted; accepted are 0..{classes - 1} and {ignore_index}")
