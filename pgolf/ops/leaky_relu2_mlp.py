"""The feed-forward block of the records: up-projection, leaky ReLU, square, down-projection.

    z   = x w_upᵀ                       (..., H)
    a   = z where z > 0, slope·z elsewhere
    out = (a ⊙ a) w_downᵀ               (..., D)

`slope = 0` is relu². The derivative of a² in z is 2a where a > 0 and 2·slope·a elsewhere: for slopes >= 0 the
tensor `a` alone says everything that a backward pass needs.

Shapes and dtypes: x (..., D), w_up (H, D), w_down (D, H), all of one floating dtype (under autocast any mixture);
out like x. Any D, H >= 0 and any number of tokens, none included. Differentiable in x, w_up and w_down.
Cost for T tokens: 4·T·D·H FLOPs forward, twice that backward; the least traffic is x, a, out and the weights once.
Errors: `TypeError` for a wrong type or dtype, `ValueError` for a shape, device or slope that does not fit.
Source: squared ReLU, So et al., Primer, arXiv 2109.08668; the leaky form comes from the challenge's records.
"""

import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks

backends.register("leaky_relu2_mlp")


def leaky_relu2_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5) -> Tensor:
    """leaky_relu(x w_upᵀ, slope)² w_downᵀ.

    Args:
        x: (..., D) activations, floating.
        w_up: (H, D), dtype of x.
        w_down: (D, H), dtype of x.
        slope: factor of negative values, 0 to 1; 0 is relu².
    Returns:
        (..., D), dtype of x (under autocast, the autocast dtype).
    """
    _check(x, w_up, w_down, slope)
    backends.choose("leaky_relu2_mlp", x.device.type)
    return leaky_relu2_mlp_reference(x, w_up, w_down, slope)


def leaky_relu2_mlp_reference(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5) -> Tensor:
    """The definition in plain PyTorch; arguments as for `leaky_relu2_mlp`."""
    z = F.linear(x, w_up)  # (..., H)
    a = F.leaky_relu(z, slope) if slope else F.relu(z)  # 0 · (-inf) would be NaN
    return F.linear(a * a, w_down)


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
