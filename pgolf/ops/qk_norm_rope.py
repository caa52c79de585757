"""Queries and keys between projection and attention: RMSNorm a head, rotation of its first part, gain of queries.

Only the inputs are kept for the backward pass. The kernels need R a power of 2; other sizes are for plain PyTorch.
Cost for Q and K bytes of queries and keys: 2 (Q + K) forward and 3 (Q + K) backward, the gain's gradient included.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.definition import in_full, widened
from pgolf.ops.residual_rms_norm import epsilon, inverse_rms

backends.register("qk_norm_rope", triton=("cuda",))


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Norm, rotate and scale queries and keys, as attention reads them.

        n = x / sqrt(mean(x²) + eps)                          over head_dim; eps is that of float32, for float64 its own
        (a, b, rest) = n                                      of sizes R, R and D - 2 R
        out = (a cos + b sin, b cos - a sin, rest)            queries also times their head's gain

    Computed in float32 (float64 for float64) and rounded once. Differentiable in q, k and gain, once; the tables are
    constants.

    Args:
        q: (..., heads, D) query projections, floating.
        k: (..., kv_heads, D) key projections, dtype of q.
        cos: (rows, R) cosines, dtype of q or float32, 2 R <= D, for the tokens of q and k in their order, begun anew
            after each `rows` of them; the number of tokens is a multiple of rows.
        sin: (rows, R) sines, dtype as for cos.
        gain: (heads,) factors of the queries, dtype as for cos.
    Returns:
        Queries and keys, new, of the shapes and dtype of q and k.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape or device that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> angles = torch.arange(8).unsqueeze(1) / 10.0 ** torch.arange(4)  # 8 positions, R = 4
        >>> q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
        >>> q, k = ops.qk_norm_rope(q, k, angles.cos(), angles.sin(), torch.ones(4))
        >>> q.shape, k.shape
        (torch.Size([2, 8, 4, 16]), torch.Size([2, 8, 2, 16]))

    Sources: rotation, RoFormer, arXiv 2104.09864; norm of queries and keys, arXiv 2010.04245; rotation of part of a
    head and the gain come from the challenge's records.
    """
    check(q, k, cos, sin, gain)
    backend = "reference" if q.dtype == torch.float64 else backends.choose("qk_norm_rope", q.device.type)
    tokens = math.prod(q.shape[:-2])
    flat = [x.reshape(tokens, *x.shape[-2:]) for x in (q, k)]
    q_out, k_out = forward(*flat, cos, sin, gain, backend)
    return q_out.view(q.shape), k_out.view(k.shape)


def qk_norm_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as for `qk_norm_rope`."""
    turned = rotate(F.rms_norm(q, q.shape[-1:]), cos, sin) * gain.unsqueeze(-1)
    return turned.to(q.dtype), rotate(F.rms_norm(k, k.shape[-1:]), cos, sin).to(k.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 R values of each head: x (..., heads, D), tables (rows, R) as for `qk_norm_rope`."""
    rows, half = cos.shape
    by_row = x.reshape(math.prod(x.shape[:-2]) // max(rows, 1), rows, *x.shape[-2:])
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b, rest = by_row[..., :half], by_row[..., half : 2 * half], by_row[..., 2 * half :]
    parts = [a * cos + b * sin, b * cos - a * sin]
    return torch.cat([*parts, rest] if rest.shape[-1] else parts, dim=-1).view(x.shape)


@torch.library.custom_op("pgolf::qk_norm_rope", mutates_args=())
def forward(
    q: Tensor,  # (T, heads, D)
    k: Tensor,  # (T, kv_heads, D)
    cos: Tensor,  # (rows, R)
    sin: Tensor,
    gain: Tensor,  # (heads,)
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(q, k, cos, sin, gain)  # again: this operation can be called without the public function
    if uses_kernel(q, k, cos, backend):
        from pgolf.triton_kernels.memory import by_token  # here, because triton is not on every machine
        from pgolf.triton_kernels.qk_norm_rope import launch

        constants = (value.contiguous() for value in (cos, sin, gain))
        return launch(by_token(q), by_token(k), *constants, epsilon(q.dtype))
    return in_full(qk_norm_rope_reference, q, k, cos, sin, gain)


@forward.register_fake
def _(q, k, cos, sin, gain, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("pgolf::qk_norm_rope_backward", mutates_args=())
def _gradients(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, q_grad: Tensor, k_grad: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk, dgain
    if uses_kernel(q, k, cos, backend):
        from pgolf.triton_kernels.memory import by_token
        from pgolf.triton_kernels.qk_norm_rope import launch_backward

        others = (value.contiguous() for value in (cos, sin, gain, q_grad, k_grad))
        dq, dk, dgain = launch_backward(by_token(q), by_token(k), *others, epsilon(q.dtype))
        return dq, dk, dgain.to(gain.dtype)
    dq, products = gradient_in_pytorch(q, cos, sin, q_grad, gain.unsqueeze(-1))
    dk, _ = gradient_in_pytorch(k, cos, sin, k_grad, 1.0)
    return dq, dk, products.sum(0).to(gain.dtype)


@_gradients.register_fake
def _(q, k, cos, sin, gain, q_grad, k_grad, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), gain.new_empty(gain.shape)


def gradient_in_pytorch(x, cos, sin, grad, factor) -> tuple[Tensor, Tensor]:
    """The gradient of x (T, heads, D), and Σ grad · normalised and rotated x (T, heads)."""
    wide = widened(x)
    inverse = inverse_rms(wide, x.dtype)
    back = rotate(widened(grad), cos, -sin)
    along = (back * wide).sum(-1, keepdim=True) * inverse
    dx = (back - wide * (along * inverse / x.shape[-1])) * (inverse * factor)
    return dx.to(x.dtype), along.squeeze(-1)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, q_grad: Tensor, k_grad: Tensor):
    dq, dk, dgain = _gradients(*ctx.saved_tensors, q_grad, k_grad, ctx.backend)
    return dq, dk, None, None, dgain, None


forward.register_autograd(_backward, setup_context=_setup_context)


def uses_kernel(q: Tensor, k: Tensor, cos: Tensor, backend: str) -> bool:
    if backend != "triton" or 0 in (q.numel(), k.numel(), cos.numel()):
        return False
    from pgolf.triton_kernels.qk_norm_rope import accepts

    return accepts(q.dtype, q.shape[1], k.shape[1], q.shape[2], cos.shape[1])


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> None:
    checks.tensor("q", q, checks.FLOATS)
    checks.tensor("k", k, (q.dtype,))
    for name, value in (("cos", cos), ("sin", sin), ("gain", gain)):
        checks.tensor(name, value, (q.dtype, torch.float32))
    if q.ndim < 2:
        raise ValueError(f"q: shape {tuple(q.shape)} is not accepted; expected (..., heads, D)")
    if k.ndim < 2:
        raise ValueError(f"k: shape {tuple(k.shape)} is not accepted; expected (..., kv_heads, D)")
    checks.shape("k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "tokens and head_dim of q")
    if cos.ndim != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"cos: shape {tuple(cos.shape)} is not accepted; expected (rows, R) with 2 R <= {q.shape[-1]}")
    tokens = math.prod(q.shape[:-2])
    if tokens % max(cos.shape[0], 1) or (tokens and not cos.shape[0]):
        raise ValueError(f"cos: {cos.shape[0]} rows are not accepted for {tokens} tokens; expected a divisor")
    checks.shape("sin", sin, cos.shape, "as cos")
    checks.shape("gain", gain, q.shape[-2:-1], "one for each head of q")
    checks.same_device("q", q, k=k, cos=cos, sin=sin, gain=gain)
