"""Exclusive self-attention with the gate a head: between attention and its output projection.

Only the inputs are kept for the backward pass. Cost for Y and V bytes of y and v: 2 Y + V forward and 3 Y + 2 V
backward, and the logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.definition import in_full, widened

EPSILON = 1e-12  # of torch's normalize

backends.register("xsa_gate", triton=("cuda",))


def xsa_gate(y: Tensor, v: Tensor, logits: Tensor | None = None, gain: float = 1.0, logit_scale: float = 1.0) -> Tensor:
    """Attention's output without its part along the token's own value, gated.

        u   = v / max(|v|, 1e-12)                             the direction of the token's own value, for its query
        heads o   = y - (y · u) u
        out = o · gain · σ(logit_scale · logit)               without logits out = o

    heads is a multiple of kv_heads, and neighbouring heads share a value. Computed in float32 (float64 for float64) and
    rounded once. Differentiable in y, v and logits, once.

    Args:
        y: (..., heads, D) attention's output, floating.
        v: (..., kv_heads, D) values, dtype of y.
        logits: (..., heads) of the gate, dtype of y, or None.
        gain: the gate's largest value.
        logit_scale: factor of the logits.
    Returns:
        (..., heads, D), the dtype of y.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, number or device that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> y, v, logits = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 4)
        >>> ops.xsa_gate(y, v, logits, gain=2.0).shape
        torch.Size([2, 8, 4, 16])

    Source: PRs #265 and #478 of the challenge; gates, PRs #1667 and #1787.
    """
    _check(y, v, logits, gain, logit_scale)
    backend = "reference" if y.dtype == torch.float64 else backends.choose("xsa_gate", y.device.type)
    tokens = math.prod(y.shape[:-2])
    flat = logits if logits is None else logits.reshape(tokens, y.shape[-2])
    y_flat, v_flat = (x.reshape(tokens, *x.shape[-2:]) for x in (y, v))
    return _forward(y_flat, v_flat, flat, float(gain), float(logit_scale), backend).view(y.shape)


def xsa_gate_reference(
    y: Tensor, v: Tensor, logits: Tensor | None = None, gain: float = 1.0, logit_scale: float = 1.0
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `xsa_gate`."""
    y = exclude_self(y, v)
    return y if logits is None else gate_heads(y, logits, gain, logit_scale)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """y - (y · u) u, u = v / |v|, as for `xsa_gate`. The heads of a value are a dimension: v is not repeated."""
    grouped = y.unflatten(-2, (v.shape[-2], -1))  # (..., kv_heads, heads / kv_heads, D)
    u = F.normalize(v, dim=-1).unsqueeze(-2)
    return (grouped - (grouped * u).sum(dim=-1, keepdim=True) * u).flatten(-3, -2)


def gate_heads(y: Tensor, logits: Tensor, gain: float = 1.0, scale: float = 1.0) -> Tensor:
    """y · gain · σ(scale · logits): y (..., heads, D), logits (..., heads)."""
    return y * (gain * torch.sigmoid(scale * logits)).unsqueeze(-1)


@torch.library.custom_op("pgolf::xsa_gate", mutates_args=())
def _forward(
    y: Tensor,  # (T, heads, D)
    v: Tensor,  # (T, kv_heads, D)
    logits: Tensor | None,  # (T, heads)
    gain: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    _check(y, v, logits, gain, logit_scale)  # again: this operation can be called without the public function
    if _uses_kernel(y, v, backend):
        from pgolf.triton_kernels.memory import by_token  # here, because triton is not on every machine
        from pgolf.triton_kernels.xsa_gate import launch

        gates = None if logits is None else by_token(logits)
        return launch(y.contiguous(), by_token(v), gates, gain, logit_scale)
    return in_full(xsa_gate_reference, y, v, logits, gain, logit_scale)


@_forward.register_fake
def _(y, v, logits, gain, logit_scale, backend):
    return y.new_empty(y.shape)


@torch.library.custom_op("pgolf::xsa_gate_backward", mutates_args=())
def _gradients(
    y: Tensor, v: Tensor, logits: Tensor | None, grad: Tensor, gain: float, logit_scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # dy, dv, dlogits
    if _uses_kernel(y, v, backend):
        from pgolf.triton_kernels.memory import by_token
        from pgolf.triton_kernels.xsa_gate import launch_backward

        gates = None if logits is None else by_token(logits)
        dy, dv, dlogits = launch_backward(y.contiguous(), by_token(v), gates, grad.contiguous(), gain, logit_scale)
        return dy, dv, y.new_empty(0) if dlogits is None else dlogits
    values = widened(v).unsqueeze(2)  # (T, kv_heads, 1, D)
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    u = values / length.clamp_min(EPSILON)
    grouped, e = (widened(x).unflatten(1, (v.shape[1], -1)) for x in (y, grad))
    along = (grouped * u).sum(-1, keepdim=True)
    dlogits = y.new_empty(0)
    if logits is not None:
        sigmoid = torch.sigmoid(logit_scale * logits.to(u.dtype)).reshape(*grouped.shape[:-1], 1)
        dgate = (e * (grouped - along * u)).sum(-1, keepdim=True)
        dlogits = (dgate * (gain * logit_scale) * sigmoid * (1 - sigmoid)).view(logits.shape).to(y.dtype)
        e = e * (gain * sigmoid)
    e_along = (e * u).sum(-1, keepdim=True)
    du = -(along * e + e_along * grouped).sum(2, keepdim=True)
    outward = torch.where(length > EPSILON, (du * u).sum(-1, keepdim=True), 0.0)
    dv = ((du - outward * u) / length.clamp_min(EPSILON)).squeeze(2)
    return (e - e_along * u).flatten(1, 2).to(y.dtype), dv.to(v.dtype), dlogits


@_gradients.register_fake
def _(y, v, logits, grad, gain, logit_scale, backend):
    return y.new_empty(y.shape), v.new_empty(v.shape), y.new_empty(0 if logits is None else logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    y, v, logits, ctx.gain, ctx.logit_scale, ctx.backend = inputs
    ctx.save_for_backward(y, v, logits)


def _backward(ctx, grad: Tensor):
    y, v, logits = ctx.saved_tensors
    dy, dv, dlogits = _gradients(y, v, logits, grad, ctx.gain, ctx.logit_scale, ctx.backend)
    return dy, dv, None if logits is None else dlogits, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _uses_kernel(y: Tensor, v: Tensor, backend: str) -> bool:
    if backend != "triton" or y.numel() == 0:
        return False
    from pgolf.triton_kernels.xsa_gate import accepts

    return accepts(y.dtype, y.shape[2], y.shape[1] // v.shape[1])


def _check(y: Tensor, v: Tensor, logits: Tensor | None, gain: float, logit_scale: float) -> None:
    checks.tensor("y", y, checks.FLOATS)
    checks.tensor("v", v, (y.dtype,))
    if y.ndim < 2:
        raise ValueError(f"y: shape {tuple(y.shape)} is not accepted; expected (..., heads, D)")
    if v.ndim < 2 or not v.shape[-2] or y.shape[-2] % v.shape[-2]:
        raise ValueError(
            f"v: shape {tuple(v.shape)} is not accepted; expected (..., kv_heads, D) with kv_heads a divisor of "
            f"{y.shape[-2]}"
        )
    checks.shape("v", v, (*y.shape[:-2], v.shape[-2], y.shape[-1]), "tokens and head_dim of y")
    checks.same_device("y", y, v=v)
    if logits is not None:
        checks.tensor("logits", logits, (y.dtype,))
        checks.shape("logits", logits, y.shape[:-1], "one for each head of y")
        checks.same_device("y", y, logits=logits)
    checks.number("gain", gain)
    checks.number("logit_scale", logit_scale)
