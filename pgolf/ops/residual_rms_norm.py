"""What a layer does to the residual stream before it reads it: add, mix with other streams, RMSNorm and scale.

One stream: the mix with the embedding of every record; two: that and a U-Net skip, whose gate and weight are products
of weights a channel; three: two lanes and their branches before the final norm (pgolf/model/lanes.py).

Kept for the backward pass: m without streams; else u, where it was asked for, or x and branch, and the streams. No norm
and no product. The backward pass is one pass over rows that also sums the weights' gradients; x and branch share one
gradient.

Cost for T tokens, X = T·D·sizeof(x) bytes: with a branch and one stream 5 X forward and 7 X backward, without streams
4 X and 4 X. In plain PyTorch each product, sum and norm reads and writes X of its own.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks

MOST_STREAMS = 3

backends.register("residual_rms_norm", triton=("cuda",))


def residual_rms_norm(
    x: Tensor,
    branch: Tensor | None = None,
    streams: Sequence[Tensor] = (),
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, mix other streams in, and normalise: the new stream m and its norm y.

        u = x + branch                                  the residual add
        m = w_0 ⊙ u + Σ_i w_i ⊙ z_i                     z_i the streams, at most 3; w has one weight a channel
        y = scale · m / sqrt(mean(m²) + eps)            over D; eps is that of float32, for float64 its own

    Without streams m = u and there are no weights. Computed in float32 (float64 for float64) and rounded once.
    Differentiable in all tensors, once.

    Args:
        x: (..., D) residual stream, floating.
        branch: (..., D) what is added to it, dtype of x, or None.
        streams: at most 3 of (..., D), dtype of x, mixed in.
        weights: (1 + streams, D) of x + branch and of each stream, dtype of x or float32; None without streams.
        scale: factor of y.
    Returns:
        m and y, both of the shape and dtype of x.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, number or device that does not fit; weights without streams or streams without weights.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> x, branch, embedding = torch.randn(3, 2, 8, 16)
        >>> mixed, normed = ops.residual_rms_norm(x, branch, [embedding], torch.ones(2, 16))
        >>> mixed.shape, normed.shape
        (torch.Size([2, 8, 16]), torch.Size([2, 8, 16]))

    Source: RMSNorm, arXiv 1910.07467; the mix with the embedding and skips by channel come from the challenge's
    records.
    """
    _, mixed, normed = residual_sum_rms_norm(x, branch, streams, weights, scale, keep_sum=False)
    return mixed, normed


def residual_sum_rms_norm(
    x: Tensor,
    branch: Tensor | None = None,
    streams: Sequence[Tensor] = (),
    weights: Tensor | None = None,
    scale: float = 1.0,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_rms_norm` that also gives the sum before the mix: (u, m, y).

        u = x + branch,   m = w_0 ⊙ u + Σ_i w_i ⊙ z_i,   y = scale · m / sqrt(mean(m²) + eps)

    For layers whose output is needed later without the mix, as that of a U-Net skip. Differentiable in all tensors,
    once.

    Args:
        x: (..., D) residual stream, floating.
        branch: (..., D) what is added to it, dtype of x, or None.
        streams: at most 3 of (..., D), dtype of x, mixed in.
        weights: (1 + streams, D) of x + branch and of each stream, dtype of x or float32; None without streams.
        scale: factor of y.
        keep_sum: False gives m in place of u, and saves writing u.
    Returns:
        u, m and y, all of the shape and dtype of x.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, number or device that does not fit; weights without streams or streams without weights.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> x, branch = torch.randn(2, 4, 16)
        >>> total, mixed, normed = ops.residual_sum_rms_norm(x, branch)
        >>> torch.equal(total, x + branch), torch.equal(mixed, total), normed.shape
        (True, True, torch.Size([4, 16]))

    Source: as for `residual_rms_norm`.
    """
    _check(x, branch, streams, weights, scale)
    padded = [*streams, *[None] * (MOST_STREAMS - len(streams))]
    shape = (math.prod(x.shape[:-1]), x.shape[-1])
    flat = [None if value is None else value.reshape(shape) for value in (x, branch, *padded)]
    backend = "reference" if x.dtype == torch.float64 else backends.choose("residual_rms_norm", x.device.type)
    keep_sum = keep_sum and len(streams) > 0 and branch is not None
    total, mixed, normed = _forward(*flat, weights, float(scale), keep_sum, backend)
    mixed = mixed.view(x.shape) if branch is not None or streams else x
    if not keep_sum:
        total = x if branch is None else mixed
    return total.view(x.shape), mixed, normed.view(x.shape)


def residual_rms_norm_reference(
    x: Tensor,
    branch: Tensor | None = None,
    streams: Sequence[Tensor] = (),
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as for `residual_rms_norm`."""
    _, mixed = add_and_mix(x, branch, streams, weights)
    mixed = mixed.to(x.dtype)
    return mixed, norm(mixed, scale)


def add_and_mix(
    x: Tensor, branch: Tensor | None = None, streams: Sequence[Tensor] = (), weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u and m of the definition."""
    total = x if branch is None else x + branch
    return total, total if weights is None else mix_streams(total, streams, weights)


def mix_streams(x: Tensor, streams: Sequence[Tensor], weights: Tensor) -> Tensor:
    """w_0 ⊙ x + Σ_i w_i ⊙ z_i."""
    mixed = weights[0] * x
    for i, stream in enumerate(streams, 1):
        mixed = mixed + weights[i] * stream
    return mixed


def norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · x / sqrt(mean(x²) + eps) over the last dimension: RMSNorm without weights."""
    x = F.rms_norm(x, x.shape[-1:])
    return x if scale == 1.0 else x * scale


def epsilon(dtype: torch.dtype) -> float:
    """What torch's rms_norm adds to the mean of squares."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def inverse_rms(m: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / sqrt(mean(m²) + eps) over the last dimension, with the epsilon of `dtype`."""
    return (m.square().mean(-1, keepdim=True) + epsilon(dtype)).rsqrt()


def norm_gradient(m: Tensor, g: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The gradient of m where g is that of scale · m · inverse_rms(m)."""
    inverse = inverse_rms(m, dtype)
    return (g - m * ((m * g).mean(-1, keepdim=True) * inverse * inverse)) * (scale * inverse)


# Two operations, so that the compiler plans around them. Results that were not asked for have no elements.


@torch.library.custom_op("pgolf::residual_rms_norm", mutates_args=())
def _forward(
    x: Tensor,  # (T, D), as branch, first, second and third
    branch: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    weights: Tensor | None,  # (1 + streams, D)
    scale: float,
    keep_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # u, m, y
    streams = _given(first, second, third)
    _check(x, branch, streams, weights, scale)  # again: this operation can be called without the public function
    if keep_sum and (branch is None or not streams):
        raise ValueError("keep_sum: accepted with a branch and streams only; else the sum is the input or m")
    if _uses_kernel(x, backend):
        from pgolf.triton_kernels.residual_rms_norm import launch  # here, because triton is not on every machine

        inputs = _contiguous(x, branch, *streams)
        kept, mixed, normed = launch(
            inputs[0], inputs[1], inputs[2:], _dense(weights), scale, epsilon(x.dtype), keep_sum
        )
        return x.new_empty(0) if kept is None else kept, x.new_empty(0) if mixed is None else mixed, normed
    total, mixed = add_and_mix(*_widened(x, branch, streams, weights))
    normed = norm(mixed, scale)
    return (
        total.to(x.dtype) if keep_sum else x.new_empty(0),
        mixed.to(x.dtype) if branch is not None or streams else x.new_empty(0),
        normed.to(x.dtype, memory_format=torch.contiguous_format),
    )


@_forward.register_fake
def _(x, branch, first, second, third, weights, scale, keep_sum, backend):
    changed = branch is not None or first is not None
    return x.new_empty(x.shape if keep_sum else 0), x.new_empty(x.shape if changed else 0), x.new_empty(x.shape)


@torch.library.custom_op("pgolf::residual_rms_norm_backward", mutates_args=())
def _gradients(
    x: Tensor,  # (T, D), as all but the weights
    branch: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    weights: Tensor | None,
    grad_sum: Tensor | None,
    grad_mixed: Tensor | None,
    grad_normed: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # dx, dfirst, dsecond, dthird, dweights
    streams = _given(first, second, third)
    if _uses_kernel(x, backend):
        from pgolf.triton_kernels.residual_rms_norm import launch_backward

        inputs = _contiguous(x, branch, *streams)
        upstream = _contiguous(grad_sum, grad_mixed, grad_normed)
        dx, gradients, dweights = launch_backward(
            inputs[0], inputs[1], inputs[2:], _dense(weights), *upstream, scale, epsilon(x.dtype)
        )
    else:
        dx, gradients, dweights = _gradients_in_pytorch(
            x, branch, streams, weights, grad_sum, grad_mixed, grad_normed, scale
        )
    empty = [x.new_empty(0) for _ in range(MOST_STREAMS - len(gradients))]
    return dx, *gradients, *empty, x.new_empty(0) if weights is None else dweights.to(weights.dtype)


@_gradients.register_fake
def _(x, branch, first, second, third, weights, grad_sum, grad_mixed, grad_normed, scale, backend):
    dstreams = (x.new_empty(0 if value is None else value.shape) for value in (first, second, third))
    return x.new_empty(x.shape), *dstreams, x.new_empty(0) if weights is None else weights.new_empty(weights.shape)


def _gradients_in_pytorch(x, branch, streams, weights, grad_sum, grad_mixed, grad_normed, scale):
    dtype = x.dtype
    x, branch, streams, weights = _widened(x, branch, streams, weights)
    total, mixed = add_and_mix(x, branch, streams, weights)
    d = norm_gradient(mixed, grad_normed.to(mixed.dtype), dtype, scale)
    if grad_mixed is not None:
        d = d + grad_mixed
    dx, gradients, dweights = d, [], None
    if weights is not None:
        dweights = torch.stack([(d * value).sum(0) for value in (total, *streams)])
        dx, *gradients = [(weight * d).to(dtype) for weight in weights]
    if grad_sum is not None:
        dx = (weights[0] * d if weights is not None else d) + grad_sum
    return dx.to(dtype), gradients, dweights


def _setup_context(ctx, inputs, output) -> None:
    x, branch, first, second, third, weights, ctx.scale, keep_sum, ctx.backend = inputs
    total, mixed, _ = output
    ctx.has_branch = branch is not None
    ctx.mark_non_differentiable(*(out for out in (total, mixed) if out.shape != x.shape))
    ctx.set_materialize_grads(False)
    if first is None and branch is not None:
        x, branch = mixed, None
    elif keep_sum:
        x, branch = total, None
    ctx.save_for_backward(x, branch, first, second, third, weights)


def _backward(ctx, grad_sum: Tensor | None, grad_mixed: Tensor | None, grad_normed: Tensor | None):
    x, branch, *streams, weights = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(x)
    dx, *dstreams, dweights = _gradients(
        x, branch, *streams, weights, grad_sum, grad_mixed, grad_normed, ctx.scale, ctx.backend
    )
    return (
        dx,
        dx if ctx.has_branch else None,
        *(None if stream is None else d for stream, d in zip(streams, dstreams, strict=True)),
        None if weights is None else dweights,
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_setup_context)


def _widened(x, branch, streams, weights) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor | None]:
    """The same in float32, float64 for float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch, weights = (None if value is None else value.to(wide) for value in (branch, weights))
    return x.to(wide), branch, [stream.to(wide) for stream in streams], weights


def _uses_kernel(x: Tensor, backend: str) -> bool:
    if backend != "triton" or x.numel() == 0:
        return False
    from pgolf.triton_kernels.residual_rms_norm import accepts

    return accepts(x.dtype, x.shape[1])


def _given(*streams: Tensor | None) -> list[Tensor]:
    return [stream for stream in streams if stream is not None]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.contiguous() for value in tensors]


def _dense(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()


def _check(x, branch, streams, weights, scale) -> None:
    checks.tensor("x", x, checks.FLOATS)
    if x.ndim < 1:
        raise ValueError("x: a 0-dimensional tensor is not accepted; expected (..., D)")
    if len(streams) > MOST_STREAMS:
        raise ValueError(f"streams: {len(streams)} are not accepted; at most {MOST_STREAMS}")
    others = {f"streams[{i}]": stream for i, stream in enumerate(streams)}
    for name, value in {"branch": branch, **others}.items():
        if value is None and name == "branch":
            continue
        checks.tensor(name, value, (x.dtype,))
        checks.shape(name, value, x.shape, "as x")
        checks.same_device("x", x, **{name: value})
    if (weights is None) != (len(streams) == 0):
        raise ValueError("weights: expected with streams and only with them")
    if weights is not None:
        checks.tensor("weights", weights, (x.dtype, torch.float32))
        checks.shape("weights", weights, (1 + len(streams), x.shape[-1]), "1 + streams, D")
        checks.same_device("x", x, weights=weights)
    checks.number("scale", scale)
