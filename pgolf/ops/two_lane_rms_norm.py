"""Two lanes of the residual stream, from one layer's branches to the two norms that the next layer's branches read.

Only the inputs are kept for the backward pass, which is one pass over rows that also sums the gradients of keep, post,
mix and skip_weights. Cost for X bytes of a lane, with both lanes, two branches and a skip: 10 X forward and 16 X
backward.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.residual_rms_norm import epsilon, mix_streams, norm, norm_gradient

backends.register("two_lane_rms_norm", triton=("cuda",))


def two_lane_rms_norm(
    lanes: Sequence[Tensor],
    branches: Sequence[Tensor],
    keep: Tensor,
    post: Tensor,
    x0: Tensor,
    mix: Tensor,
    skip: Tensor | None = None,
    skip_weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Route a layer's two branches into two lanes, and norm each for the branch of the next layer that reads it.

        a  = keep_0 lane_0 + post_00 branch_0 + post_10 branch_1
        b  = keep_1 lane_1 + post_01 branch_0 + post_11 branch_1
        a' = s_0 ⊙ a + s_1 ⊙ skip                       s the skip_weights, where a skip returns; else a' = a
        m  = mix_0 ⊙ a' + mix_1 ⊙ x_0                   x_0 is the normalised embedding
        y_0 = scale · m / sqrt(mean(m²) + eps),   y_1 = scale · b / sqrt(mean(b²) + eps)

    over D; eps is that of float32, for float64 its own. Attention reads y_0 and the MLP y_1; a' and b are the new
    lanes. Computed in float32 (float64 for float64) and rounded once. Differentiable in all tensors, once.

    Args:
        lanes: two of (..., D), dtype of x0, attention's and the MLP's; one where they part (lane_1 = lane_0).
        branches: at most two of (..., D), dtype of x0: attention's and the MLP's output, which are added.
        keep: (2,) factors of the lanes, dtype of x0 or float32.
        post: (2, 2) factors of the branches, dtype as for keep; post[j, i] is that of branch j in lane i.
        x0: (..., D) what is mixed into the first lane before its norm, floating.
        mix: (2, D) weights of the first lane and of x0, dtype as for keep.
        skip: (..., D) an earlier output that returns in the first lane, dtype of x0, or None.
        skip_weights: (2, D) of the first lane and of the skip, dtype as for keep; None without a skip.
        scale: factor of both norms.
    Returns:
        a', b, y_0 and y_1, all of the shape and dtype of x0.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, number or device that does not fit; a skip without weights or weights without a skip.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> x0, attention, mlp, *lanes = torch.randn(5, 8, 16)
        >>> keep, post, mix = torch.ones(2), torch.ones(2, 2), torch.ones(2, 16)
        >>> first, second, y0, y1 = ops.two_lane_rms_norm(lanes, [attention, mlp], keep, post, x0, mix)
        >>> first.shape, y1.shape
        (torch.Size([8, 16]), torch.Size([8, 16]))

    Source: two lanes, PR #1529 of the challenge; RMSNorm, arXiv 1910.07467.
    """
    _check(lanes, branches, keep, post, x0, mix, skip, skip_weights, scale)
    shape = (math.prod(x0.shape[:-1]), x0.shape[-1])

    def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.reshape(shape) for tensor in tensors]

    exact = x0.dtype == torch.float64
    backend = "reference" if exact else backends.choose("two_lane_rms_norm", x0.device.type)
    flat_skip = None if skip is None else skip.reshape(shape)
    outs = _forward(
        flat(lanes), flat(branches), keep, post, x0.reshape(shape), mix, flat_skip, skip_weights, float(scale), backend
    )
    first, second, first_normed, second_normed = (out.view(x0.shape) for out in outs)
    return first, second, first_normed, second_normed


def two_lane_rms_norm_reference(
    lanes: Sequence[Tensor],
    branches: Sequence[Tensor],
    keep: Tensor,
    post: Tensor,
    x0: Tensor,
    mix: Tensor,
    skip: Tensor | None = None,
    skip_weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as for `two_lane_rms_norm`."""
    _, second, first, mixed = _route_and_mix(lanes, branches, keep, post, x0, mix, skip, skip_weights)
    outs = first, second, norm(mixed, scale), norm(second, scale)
    first, second, first_normed, second_normed = (out.to(x0.dtype) for out in outs)
    return first, second, first_normed, second_normed


def route_to_lanes(
    lanes: Sequence[Tensor], branches: Sequence[Tensor], keep: Tensor, post: Tensor
) -> tuple[Tensor, Tensor]:
    """a and b of the definition."""
    routed = []
    for i in range(2):
        lane = keep[i] * lanes[i % len(lanes)]
        for j, branch in enumerate(branches):
            lane = lane + post[j, i] * branch
        routed.append(lane)
    return routed[0], routed[1]


def _route_and_mix(lanes, branches, keep, post, x0, mix, skip, skip_weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, a' and m of the definition."""
    a, b = route_to_lanes(lanes, branches, keep, post)
    first = a if skip is None else mix_streams(a, [skip], skip_weights)
    return a, b, first, mix_streams(first, [x0], mix)


@torch.library.custom_op("pgolf::two_lane_rms_norm", mutates_args=())
def _forward(
    lanes: Sequence[Tensor],  # one or two of (T, D), as branches, x0 and skip
    branches: Sequence[Tensor],
    keep: Tensor,  # (2,)
    post: Tensor,  # (2, 2)
    x0: Tensor,
    mix: Tensor,  # (2, D)
    skip: Tensor | None,
    skip_weights: Tensor | None,  # (2, D)
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # again: this operation can be called without the public function
    _check(lanes, branches, keep, post, x0, mix, skip, skip_weights, scale)
    if _uses_kernel(x0, backend):
        from pgolf.triton_kernels.two_lane_rms_norm import launch  # here, because triton is not on every machine

        return launch(*_dense(lanes, branches, keep, post, x0, mix, skip, skip_weights), scale, epsilon(x0.dtype))
    dtype, inputs = x0.dtype, _widened(lanes, branches, keep, post, x0, mix, skip, skip_weights)
    lanes, branches, keep, post, x0, mix, skip, skip_weights = inputs
    outs = two_lane_rms_norm_reference(lanes, branches, keep, post, x0, mix, skip, skip_weights, scale)
    a, b, y0, y1 = (out.to(dtype, memory_format=torch.contiguous_format) for out in outs)
    return a, b, y0, y1


@_forward.register_fake
def _(lanes, branches, keep, post, x0, mix, skip, skip_weights, scale, backend):
    return tuple(x0.new_empty(x0.shape) for _ in range(4))


@torch.library.custom_op("pgolf::two_lane_rms_norm_backward", mutates_args=())
def _gradients(
    lanes: Sequence[Tensor],
    branches: Sequence[Tensor],
    keep: Tensor,
    post: Tensor,
    x0: Tensor,
    mix: Tensor,
    skip: Tensor | None,
    skip_weights: Tensor | None,
    upstream: Sequence[Tensor],  # gradients of a', b, y_0, y_1
    scale: float,
    backend: str,
) -> list[Tensor]:  # of lanes, branches, x0, skip if there is one; then keep, post, mix, skip_weights if there are any
    if _uses_kernel(x0, backend):
        from pgolf.triton_kernels.two_lane_rms_norm import launch_backward

        inputs = _dense(lanes, branches, keep, post, x0, mix, skip, skip_weights)
        wide, sums = launch_backward(*inputs, [g.contiguous() for g in upstream], scale, epsilon(x0.dtype))
        dkeep, dpost, dweights = sums[:2], sums[2:6].view(2, 2), sums[6:].view(-1, 2, x0.shape[1])
    else:
        wide, dkeep, dpost, dweights = _gradients_in_pytorch(
            lanes, branches, keep, post, x0, mix, skip, skip_weights, upstream, scale
        )
    small = [keep, post, mix] if skip_weights is None else [keep, post, mix, skip_weights]
    sums = (dkeep, dpost, *dweights)
    return [*wide, *(s.to(like.dtype, copy=True) for s, like in zip(sums, small, strict=True))]


@_gradients.register_fake
def _(lanes, branches, keep, post, x0, mix, skip, skip_weights, upstream, scale, backend):
    skips = ([], []) if skip is None else ([skip], [skip_weights])
    like = (*lanes, *branches, x0, *skips[0], keep, post, mix, *skips[1])
    return [tensor.new_empty(tensor.shape) for tensor in like]


def _gradients_in_pytorch(lanes, branches, keep, post, x0, mix, skip, skip_weights, upstream, scale):
    dtype, inputs = x0.dtype, _widened(lanes, branches, keep, post, x0, mix, skip, skip_weights)
    lanes, branches, keep, post, x0, mix, skip, skip_weights = inputs
    a, second, first, mixed = _route_and_mix(*inputs)
    grad_first, grad_second, grad_first_normed, grad_second_normed = (g.to(a.dtype) for g in upstream)
    dmixed = norm_gradient(mixed, grad_first_normed, dtype, scale)
    dweights = [torch.stack([(dmixed * first).sum(0), (dmixed * x0).sum(0)])]
    dskip = []
    d = grad_first + mix[0] * dmixed
    if skip is not None:
        dskip = [skip_weights[1] * d]
        dweights.append(torch.stack([(d * a).sum(0), (d * skip).sum(0)]))
        d = skip_weights[0] * d
    ds = d, grad_second + norm_gradient(second, grad_second_normed, dtype, scale)
    dlanes = [k * d for k, d in zip(keep, ds, strict=True)]
    if len(lanes) == 1:
        dlanes = [dlanes[0] + dlanes[1]]
    dbranches = [to[0] * ds[0] + to[1] * ds[1] for to, _ in zip(post, branches, strict=False)]
    dkeep = torch.stack([(d * lanes[i % len(lanes)]).sum() for i, d in enumerate(ds)])
    dpost = torch.zeros(2, 2, dtype=a.dtype, device=a.device)
    for j, branch in enumerate(branches):
        dpost[j] = torch.stack([(d * branch).sum() for d in ds])
    wide = [t.to(dtype) for t in (*dlanes, *dbranches, mix[1] * dmixed, *dskip)]
    return wide, dkeep, dpost, dweights


def _setup_context(ctx, inputs, output) -> None:
    lanes, branches, keep, post, x0, mix, skip, skip_weights, ctx.scale, ctx.backend = inputs
    ctx.lanes = len(lanes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*lanes, *branches, keep, post, x0, mix, skip, skip_weights)


def _backward(ctx, *grads: Tensor | None):
    saved = list(ctx.saved_tensors)
    lanes, branches, others = saved[: ctx.lanes], saved[ctx.lanes : -6], saved[-6:]
    _, _, x0, _, skip, _ = others
    upstream = [torch.zeros_like(x0) if grad is None else grad for grad in grads]
    found = _gradients(lanes, branches, *others, upstream, ctx.scale, ctx.backend)
    dlanes, dbranches = found[: ctx.lanes], found[ctx.lanes : ctx.lanes + len(branches)]
    dx0, *rest = found[ctx.lanes + len(branches) :]
    dskip, dskip_weights = (None, None) if skip is None else (rest.pop(0), rest.pop())
    dkeep, dpost, dmix = rest
    return dlanes, dbranches, dkeep, dpost, dx0, dmix, dskip, dskip_weights, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _widened(lanes, branches, *others) -> tuple:
    """The same in float32, float64 for float64."""
    wide = torch.promote_types(lanes[0].dtype, torch.float32)
    rows = ([value.to(wide) for value in values] for values in (lanes, branches))
    return *rows, *(None if other is None else other.to(wide) for other in others)


def _uses_kernel(x0: Tensor, backend: str) -> bool:
    if backend != "triton" or x0.numel() == 0:
        return False
    from pgolf.triton_kernels.two_lane_rms_norm import accepts

    return accepts(x0.dtype, x0.shape[1])


def _dense(lanes, branches, *others) -> tuple:
    """Everything without gaps, as the kernels take it."""
    return (
        [lane.contiguous() for lane in lanes],
        [branch.contiguous() for branch in branches],
        *(None if other is None else other.contiguous() for other in others),
    )


def _check(lanes, branches, keep, post, x0, mix, skip, skip_weights, scale) -> None:
    checks.tensor("x0", x0, checks.FLOATS)
    if x0.ndim < 1:
        raise ValueError("x0: a 0-dimensional tensor is not accepted; expected (..., D)")
    if not 1 <= len(lanes) <= 2:
        raise ValueError(f"lanes: {len(lanes)} are not accepted; 2, or 1 where they part")
    if len(branches) > 2:
        raise ValueError(f"branches: {len(branches)} are not accepted; at most 2")
    rows = {f"lanes[{i}]": lane for i, lane in enumerate(lanes)}
    rows |= {f"branches[{i}]": branch for i, branch in enumerate(branches)}
    if (skip is None) != (skip_weights is None):
        raise ValueError("skip_weights: expected with a skip and only with it")
    by_channel = (2, x0.shape[-1]), "2, D"
    weights = {"keep": (keep, (2,), "lanes"), "post": (post, (2, 2), "branches, lanes"), "mix": (mix, *by_channel)}
    if skip is not None:
        rows["skip"], weights["skip_weights"] = skip, (skip_weights, *by_channel)
    for name, value in rows.items():
        checks.tensor(name, value, (x0.dtype,))
        checks.shape(name, value, x0.shape, "as x0")
        checks.same_device("x0", x0, **{name: value})
    for name, (value, shape, because) in weights.items():
        checks.tensor(name, value, (x0.dtype, torch.float32))
        checks.shape(name, value, shape, because)
        checks.same_device("x0", x0, **{name: value})
    checks.number("scale", scale)
