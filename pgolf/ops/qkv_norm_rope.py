"""Attention's input out of one product: queries and keys normed and rotated, values and extra columns left in place.

Three products read h three times and give three gradients of h, which a kernel sums; one product has one. What usually
eats this gain is the way back, where gradients of the parts are padded or concatenated. Here one pass writes the
gradient of all columns (zeros for the unused) and sums the gain's. Values that two operations read are handed out
twice: the same pass adds their two gradients. Only the inputs are kept for the backward pass.

Cost for Q, K, V, E and U bytes of the parts: 2 (Q + K) forward and 3 (Q + K) + (readers + 1) V + 2 E + U backward.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.qk_norm_rope import check as check_heads
from pgolf.ops.qk_norm_rope import forward, gradient_in_pytorch, qk_norm_rope_reference, uses_kernel
from pgolf.ops.residual_rms_norm import epsilon

MOST_READERS, MOST_EXTRA = 2, 1024

backends.register("qkv_norm_rope", triton=("cuda",))


def qkv_norm_rope(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    kv_heads: int,
    head_dim: int,
    readers: int = 1,
    extra: int = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """Cut one product for q, k, v (and a gate, say) into its parts; norm and rotate q and k.

        (q | k | v | extra | unused) = projected        columns: heads D, kv_heads D, kv_heads D, extra, what remains
        q', k' = qk_norm_rope(q, k)                     that operation's formulas; v and extra are views

    For projected = h [W_q; W_k; W_v; W_extra]ᵀ. Differentiable in projected and gain, once; the gradient of all columns
    is written in one pass.

    Args:
        projected: (..., C) the joined product, floating, C at least (heads + 2 kv_heads) D + extra.
        cos: (rows, R) cosines, dtype of projected or float32, 2 R <= head_dim; the number of tokens is a multiple of
            rows.
        sin: (rows, R) sines, dtype as for cos.
        gain: (heads,) factors of the queries, dtype as for cos.
        kv_heads: heads of k and of v.
        head_dim: D.
        readers: how often v is handed out, 1 or 2: once for each operation that reads it.
        extra: columns after v that are handed out, 0 to 1024; those of a gate, say.
    Returns:
        q' (..., heads, D) and k' (..., kv_heads, D), new; a tuple with v (..., kv_heads, D) for each reader; and the
        extra columns (..., extra). All have the dtype of projected; v and extra are views of it that nothing may write
        to.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, number or device that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> angles = torch.arange(8).unsqueeze(1) / 10.0 ** torch.arange(4)
        >>> projected = torch.randn(2, 8, (4 + 2 * 2) * 16)  # 4 heads, 2 kv_heads, D = 16
        >>> q, k, (v,), _ = ops.qkv_norm_rope(projected, angles.cos(), angles.sin(), torch.ones(4), 2, 16)
        >>> q.shape, k.shape, v.shape
        (torch.Size([2, 8, 4, 16]), torch.Size([2, 8, 2, 16]), torch.Size([2, 8, 2, 16]))

    Source: one product for q, k and v, with its cost where copies follow, PRs #670 and #1615 of the challenge.
    """
    _check(projected, cos, sin, gain, kv_heads, head_dim, readers, extra)
    exact = projected.dtype == torch.float64
    backend = "reference" if exact else backends.choose("qkv_norm_rope", projected.device.type)
    lead = projected.shape[:-1]
    flat = projected.reshape(math.prod(lead), projected.shape[-1])
    q, k, *values, others = _JoinedHeads.apply(flat, cos, sin, gain, kv_heads, head_dim, readers, extra, backend)
    values = tuple(v.view(*lead, kv_heads, head_dim) for v in values)
    return q.view(*lead, *q.shape[1:]), k.view(*lead, *k.shape[1:]), values, others.view(*lead, extra)


def qkv_norm_rope_reference(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    kv_heads: int,
    head_dim: int,
    readers: int = 1,
    extra: int = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """The definition in plain PyTorch; arguments as for `qkv_norm_rope`."""
    q, k, v, others = _split(projected, gain.shape[0], kv_heads, head_dim, extra)
    return *qk_norm_rope_reference(q, k, cos, sin, gain), (v,) * readers, others


class _JoinedHeads(torch.autograd.Function):
    """Both passes are registered operations, which may not return views; this joins them and the views."""

    @staticmethod
    def forward(ctx, projected, cos, sin, gain, kv_heads, head_dim, readers, extra, backend):
        q, k, *_ = _split(projected, gain.shape[0], kv_heads, head_dim, extra)
        views = [_split(projected, gain.shape[0], kv_heads, head_dim, extra)[2:] for _ in range(readers)]
        ctx.save_for_backward(q, k, cos, sin, gain)
        ctx.columns, ctx.backend = projected.shape[1], backend
        return *forward(q, k, cos, sin, gain, backend), *(v for v, _ in views), views[0][1]

    @staticmethod
    def backward(ctx, q_grad, k_grad, *others):
        *v_grads, extra_grad = others
        inputs = (*ctx.saved_tensors, q_grad, k_grad, v_grads, extra_grad)
        dprojected, dgain = _gradients(*inputs, ctx.columns, ctx.backend)
        return dprojected, None, None, dgain, None, None, None, None, None


@torch.library.custom_op("pgolf::qkv_norm_rope_backward", mutates_args=())
def _gradients(
    q: Tensor,  # (T, heads, D)
    k: Tensor,  # (T, kv_heads, D)
    cos: Tensor,  # (rows, R)
    sin: Tensor,
    gain: Tensor,  # (heads,)
    q_grad: Tensor,
    k_grad: Tensor,
    v_grads: Sequence[Tensor],  # one for each reader, as k
    extra_grad: Tensor,  # (T, extra)
    columns: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # dprojected (T, columns), dgain
    if uses_kernel(q, k, cos, backend):
        from pgolf.triton_kernels.memory import by_token  # here, because triton is not on every machine
        from pgolf.triton_kernels.qkv_norm_rope import launch_backward

        others = (value.contiguous() for value in (cos, sin, gain, q_grad, k_grad, v_grads[0], v_grads[-1], extra_grad))
        dprojected, dgain = launch_backward(by_token(q), by_token(k), *others, len(v_grads), columns, epsilon(q.dtype))
        return dprojected, dgain.to(gain.dtype)
    dq, products = gradient_in_pytorch(q, cos, sin, q_grad, gain.unsqueeze(-1))
    dk, _ = gradient_in_pytorch(k, cos, sin, k_grad, 1.0)
    parts = [x.flatten(1) for x in (dq, dk, sum(v_grads[1:], start=v_grads[0]), extra_grad)]
    unused = q.new_zeros(q.shape[0], columns - sum(part.shape[1] for part in parts))
    return torch.cat([*parts, unused], dim=1), products.sum(0).to(gain.dtype)


@_gradients.register_fake
def _(q, k, cos, sin, gain, q_grad, k_grad, v_grads, extra_grad, columns, backend):
    return q.new_empty(q.shape[0], columns), gain.new_empty(gain.shape)


def _split(projected: Tensor, heads: int, kv_heads: int, head_dim: int, extra: int) -> tuple[Tensor, ...]:
    """q, k and v (..., heads or kv_heads, head_dim) and the extra columns, as views."""
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, extra]
    *parts, others, _ = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
    return *(part.unflatten(-1, (-1, head_dim)) for part in parts), others


def _check(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    kv_heads: int,
    head_dim: int,
    readers: int,
    extra: int,
) -> None:
    checks.tensor("projected", projected, checks.FLOATS)
    checks.tensor("gain", gain, (projected.dtype, torch.float32))
    checks.integer("kv_heads", kv_heads, 1, 1 << 20)
    checks.integer("head_dim", head_dim, 1, 1 << 20)
    checks.integer("readers", readers, 1, MOST_READERS)
    checks.integer("extra", extra, 0, MOST_EXTRA)
    if gain.ndim != 1 or not gain.shape[0]:
        raise ValueError(f"gain: shape {tuple(gain.shape)} is not accepted; expected (heads,)")
    least = (gain.shape[0] + 2 * kv_heads) * head_dim + extra
    if projected.ndim < 1 or projected.shape[-1] < least:
        raise ValueError(
            f"projected: shape {tuple(projected.shape)} is not accepted; expected (..., C) with C >= {least} for "
            f"{gain.shape[0]} + 2 x {kv_heads} heads of {head_dim} and {extra} extra columns"
        )
    q, k, *_ = _split(projected, gain.shape[0], kv_heads, head_dim, extra)
    check_heads(q, k, cos, sin, gain)
