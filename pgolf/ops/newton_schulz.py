"""Orthogonalisation by Newton-Schulz iteration: the direction of a Muon step, for a bank of matrices at once.

For X = U S Vᵀ each step applies an odd polynomial to the singular values and leaves U and V alone:

    X ← X / ‖X‖_F                            singular values in [0, 1]
    A = X Xᵀ,  X ← a X + (b A + c A²) X      s ← a s + b s³ + c s⁵

In the end all singular values that were not tiny lie in a band around 1, so X ≈ U Vᵀ.
After 5 steps and for singular values of at least 3e-3 (of X normalised) the band is
- "quintic", (3.4445, -4.7750, 2.0315) repeated: 0.68 to 1.21;
- "polar_express", one optimal polynomial a step, with the paper's safety factor 1.01 (a/1.01, b/1.01³, c/1.01⁵; from
  the eighth step on the fixed point (1.875, -1.25, 0.375), unscaled): 0.87 to 1.13.

Shapes and dtypes: bank (M, N) or (B, M, N), wide, tall or square, float16/bfloat16/float32/float64; the products run
in that dtype, the normalisation in float32 or wider. Result like bank. Not meant to be differentiated through.
A zero matrix gives zero; scale does not matter (it is divided out before squares can underflow). A matrix of rank r
gives r singular values in the band and the others near 0. NaN or infinity in a matrix makes all of that matrix NaN.
Error against float64 for 5 steps and singular values within a factor of 10: float32 < 1e-5, float16 < 4e-3, bfloat16
< 3e-2. The bounds of single products do not hold, because a small singular value is multiplied by up to 1,000, its
rounding error with it; the error is at most that of the same products written out one by one.
Cost a step and matrix, n <= m: 4n²m + 2n³ FLOPs (symmetry would allow 3n²m + n³).
Errors: `TypeError`/`ValueError` naming the argument.
Sources: Muon, kellerjordan.github.io/posts/muon; Amsel et al., The Polar Express, arXiv 2505.16932.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops import backends, checks

Coefficients = str | Sequence[tuple[float, float, float]]

QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (  # as published, without the safety factor
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS_FIXED_POINT = (1.875, -1.25, 0.375)
SAFETY_FACTOR = 1.01
NORMALIZATIONS = ("frobenius",)

backends.register("newton_schulz")


def newton_schulz(
    bank: Tensor,
    coefficients: Coefficients = "polar_express",
    steps: int = 5,
    normalize: str = "frobenius",
    out: Tensor | None = None,
) -> Tensor:
    """Replace every matrix U S Vᵀ of `bank` by approximately U Vᵀ.

    Args:
        bank: (M, N) or (B, M, N), floating.
        coefficients: "polar_express", "quintic", or a list of (a, b, c), one a step (then `steps` is not used).
        steps: number of iterations, 1 to 100.
        normalize: "frobenius".
        out: where to write the result, like bank; may be bank itself.
    Returns:
        `out`, or a new tensor like bank.
    """
    checks.tensor("bank", bank, checks.FLOATS)
    if bank.ndim not in (2, 3):
        raise ValueError(f"bank: shape {tuple(bank.shape)} is not accepted; expected (M, N) or (B, M, N)")
    checks.choice("normalize", normalize, NORMALIZATIONS)
    polynomials = step_coefficients(coefficients, steps)
    if out is not None:
        checks.tensor("out", out, (bank.dtype,))
        checks.shape("out", out, bank.shape, "the shape of bank")
        checks.same_device("bank", bank, out=out)
    backends.choose("newton_schulz", bank.device.type)
    result = newton_schulz_reference(bank, polynomials)
    return result if out is None else out.copy_(result)


def newton_schulz_reference(bank: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """The definition in plain PyTorch: one step for each (a, b, c) of `polynomials`; bank as for `newton_schulz`."""
    if bank.numel() == 0:
        return torch.empty_like(bank)
    tall = bank.shape[-2] > bank.shape[-1]
    x = (bank.mT if tall else bank).reshape(-1, min(bank.shape[-2:]), max(bank.shape[-2:]))  # (B, n, m), n <= m
    x = _frobenius_normalized(x)
    for a, b, c in polynomials:
        gram = x @ x.mT  # (B, n, n)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(bank.shape)


def flops(rows: int, columns: int, steps: int = 5) -> int:
    """Multiplications and additions that `newton_schulz` spends on one matrix (rows, columns)."""
    n, m = sorted((rows, columns))
    return steps * (4 * n * n * m + 2 * n**3)


def step_coefficients(coefficients: Coefficients, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The (a, b, c) of every step, for a name and a number of steps or for a list."""
    if not isinstance(coefficients, str):
        return _checked(coefficients)
    checks.choice("coefficients", coefficients, ("polar_express", "quintic"))
    checks.integer("steps", steps, 1, 100)
    if coefficients == "quintic":
        return (QUINTIC,) * steps
    s = SAFETY_FACTOR
    scaled = tuple((a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:steps])
    return scaled + (POLAR_EXPRESS_FIXED_POINT,) * (steps - len(scaled))


def _checked(coefficients: Sequence[tuple[float, float, float]]) -> tuple[tuple[float, float, float], ...]:
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(f"coefficients: expected a name or a list of (a, b, c), got {type(coefficients).__name__}")
    if not coefficients:
        raise ValueError("coefficients: an empty list is not accepted; give one (a, b, c) for each step")
    for step, triple in enumerate(coefficients):
        if not isinstance(triple, (list, tuple)) or len(triple) != 3:
            raise ValueError(f"coefficients[{step}]: {triple!r} is not accepted; expected three numbers (a, b, c)")
        for number in triple:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"coefficients[{step}]: {number!r} is not accepted; expected a finite number")
    return tuple((float(a), float(b), float(c)) for a, b, c in coefficients)


def _frobenius_normalized(x: Tensor) -> Tensor:
    """x / ‖x‖_F for each matrix, x (B, n, m)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)  # (B, 1, 1)
    wide = wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)
    norm = wide.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    return (wide / norm.clamp_min(1.0)).to(x.dtype)  # the norm is at least 1 unless the matrix is zero
