"""The feed-forward block of the records: up-projection, leaky ReLU, square, down-projection.

Besides x, one tensor of tokens x H is kept for the backward pass, whatever the backend:
    reference   a, which for slopes >= 0 says all that is needed: d(a²)/dz = 2·leaky_relu(a, slope)
    triton      a² with the sign of z in its last mantissa bit (triton_kernels/leaky_relu2_mlp.py): two kernels have the
                activation in their epilogue, the other four products are plain ones and belong to the device's library
float64 is always computed by the reference.

Cost for T tokens: 4·T·D·H FLOPs forward, twice that backward. Least traffic with one hidden tensor: it is written once
and read four times, its gradient written once and read twice; at 98,304 x 512 x 2048 in bfloat16 3.4 GB, against 3.8 GB
where both a and a² are stored.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks

backends.register("leaky_relu2_mlp", triton=("cuda",))


def leaky_relu2_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5) -> Tensor:
    """The feed-forward block leaky_relu(x w_upᵀ, slope)² w_downᵀ, with one hidden tensor kept for the backward pass.

        z   = x w_upᵀ                       (..., H)
        a   = z where z > 0, slope·z elsewhere
        out = (a ⊙ a) w_downᵀ               (..., D)

    Any D, H >= 0 and any number of tokens, none included. Differentiable in x, w_up and w_down, once. Products
    accumulate in float32 or wider, those of the weights' gradients too.

    Args:
        x: (..., D) activations, floating.
        w_up: (H, D), dtype of x (under autocast any floating dtypes may be mixed).
        w_down: (D, H), dtype of x.
        slope: factor of negative values, 0 to 1; 0 is relu².
    Returns:
        (..., D), dtype of x (under autocast, the autocast dtype).
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device or slope that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> x = torch.randn(2, 8, 16, requires_grad=True)
        >>> out = ops.leaky_relu2_mlp(x, torch.randn(64, 16), torch.randn(16, 64), slope=0.5)
        >>> out.sum().backward()
        >>> out.shape, x.grad.shape
        (torch.Size([2, 8, 16]), torch.Size([2, 8, 16]))

    Source: squared ReLU, So et al., Primer, arXiv 2109.08668; the leaky form comes from the challenge's records.
    """
    _check(x, w_up, w_down, slope)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_up, w_down = (value.to(dtype) for value in (x, w_up, w_down))
    backend = backends.choose("leaky_relu2_mlp", x.device.type, "float64" if x.dtype == torch.float64 else "")
    out, _ = _forward(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w_up, w_down, float(slope), backend)
    return out.view(x.shape)


def leaky_relu2_mlp_reference(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5) -> Tensor:
    """The definition in plain PyTorch; arguments as for `leaky_relu2_mlp`."""
    a = activation(x, w_up, slope)
    return F.linear(a * a, w_down)


def activation(x: Tensor, w_up: Tensor, slope: float) -> Tensor:
    """a of `leaky_relu2_mlp`, (..., H)."""
    z = F.linear(x, w_up)
    return F.leaky_relu(z, slope, inplace=True) if slope else F.relu(z, inplace=True)  # 0 · (-inf) would be NaN


# The backend travels through the operations as an argument, because it decides what the hidden tensor holds: a backward
# pass must read it as the forward pass wrote it.


@torch.library.custom_op("pgolf::leaky_relu2_mlp", mutates_args=())
def _forward(
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (H, D)
    w_down: Tensor,  # (D, H)
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (T, D), (T, H)
    _check(x, w_up, w_down, slope)  # again: this operation can be called without the public function
    if backend == "triton" and 0 not in (*x.shape, *w_up.shape):
        from pgolf.triton_kernels.leaky_relu2_mlp import launch_up  # here, because triton is not on every machine

        hidden = squares = launch_up(x, w_up, slope)
    else:
        hidden = activation(x, w_up, slope)
        squares = hidden * hidden
    return F.linear(squares, w_down), hidden


@_forward.register_fake
def _(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], w_up.shape[0])


@torch.library.custom_op("pgolf::leaky_relu2_mlp_hidden_gradient", mutates_args=())
def _hidden_gradient(
    grad: Tensor,  # (T, D)
    w_down: Tensor,  # (D, H)
    hidden: Tensor,  # (T, H)
    slope: float,
    backend: str,
) -> Tensor:  # dz (T, H)
    if backend == "triton" and 0 not in (*grad.shape, *hidden.shape):
        from pgolf.triton_kernels.leaky_relu2_mlp import launch_gradient

        return launch_gradient(grad, w_down, hidden, slope)
    return (grad @ (w_down + w_down)).mul_(F.leaky_relu(hidden, slope))


@_hidden_gradient.register_fake
def _(grad: Tensor, w_down: Tensor, hidden: Tensor, slope: float, backend: str) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("pgolf::weight_gradient", mutates_args=())
def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of left (T, M) and right (T, N): (M, N), one rounding of a float32 sum, split or not."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and left.shape[0]:
        return torch.mm(left.t(), right, out_dtype=torch.float32).to(left.dtype)
    return left.t() @ right


@_weight_gradient.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    x, w_up, w_down, ctx.slope, ctx.backend = inputs
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_up, w_down, hidden)


def _backward(ctx, grad: Tensor, _):
    x, w_up, w_down, hidden = ctx.saved_tensors
    need_x, need_up, need_down, *_ = ctx.needs_input_grad
    dx = dw_up = dw_down = None
    if grad is None:
        return dx, dw_up, dw_down, None, None
    if need_x or need_up:
        dz = _hidden_gradient(grad, w_down, hidden, ctx.slope, ctx.backend)
        dx = dz @ w_up if need_x else None
        dw_up = _weight_gradient(dz, x) if need_up else None
    if need_down:
        dw_down = _weight_gradient(grad, hidden if ctx.backend == "triton" else hidden * hidden)
    return dx, dw_up, dw_down, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> None:
    for name, value in (("x", x), ("w_up", w_up), ("w_down", w_down)):
        checks.tensor(name, value, checks.FLOATS)
    if x.ndim < 1:
        raise ValueError("x: a 0-dimensional tensor is not accepted; expected (..., D)")
    if w_up.ndim != 2:
        raise ValueError(f"w_up: shape {tuple(w_up.shape)} is not accepted; expected (H, D)")
    checks.shape("w_up", w_up, (w_up.shape[0], x.shape[-1]), "H, D with D the last size of x")
    checks.shape("w_down", w_down, (x.shape[-1], w_up.shape[0]), "D, H as w_up transposed")
    checks.same_device("x", x, w_up=w_up, w_down=w_down)
    checks.same_dtype("x", x, w_up=w_up, w_down=w_down)
    if isinstance(slope, bool) or not isinstance(slope, (int, float)):
        raise TypeError(f"slope: expected a float, got {type(slope).__name__}")
    if not 0 <= slope <= 1:
        raise ValueError(f"slope: {slope} is not accepted; accepted are 0 to 1")
