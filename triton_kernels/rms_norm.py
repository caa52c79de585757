"""RMSNorm of rows that are in registers, and its gradient: shared by the kernels that end in a norm."""

import triton
import triton.language as tl


@triton.jit
def inverse_rms(m, columns, eps):
    """1 / sqrt(mean(m²) + eps) of each row (rows, 1); beyond its columns m is zero."""
    return (1.0 / tl.sqrt_rn(tl.sum(m * m, 1) / columns + eps))[:, None]


@triton.jit
def norm_gradient(m, g, columns, eps, scale):
    """The gradient of m where g is that of scale · m · inverse_rms(m)."""
    inverse = inverse_rms(m, columns, eps)
    along = (tl.sum(m * g, 1) / columns)[:, None] * inverse * inverse
    return (g - m * along) * (scale * inverse)
