"""Orthogonalisation by Newton-Schulz iteration: the direction of a Muon step, for a bank of matrices at once.

The reference computes the products in the bank's dtype and the normalisation in float32 or wider. The Triton path
computes one triangle of symmetric products and for bfloat16 banks iterates in float16, which has three bits more (a
list of polynomials that could leave its range is iterated in bfloat16). Those bits pay for the Gram form where the long
side is at least twice the short one, two steps at a time:

    G = X Xᵀ,  Z = aI + bG + cG²,  G ← Z G Z,  Z' = a'I + b'G + c'G²,  X ← aa'/2 X + (Z Z' - aa'/2 I) X

In the dtype of the bank it can have two to four times the error of the plain products, so float16 and float32 banks
take the steps one by one. Three steps without forming X lose the small singular values beside large ones
(bench/NOTES.md). Square banks take the steps one by one too: there the form saves nothing.

Cost of a step and matrix, n <= m: the reference 4n²m + 2n³ FLOPs, the Triton path as `flops` says. Launches of the
Triton path: 2 to normalise (with "aol" 7, one of them a product), 3 a step, in the Gram form 9 for two, and 1 to copy
where the dtype changes, a size is no multiple of 8 or `out` is given; where a x is added apart, the library may copy x
besides. So 5 steps of a bfloat16 bank take 18 if it is square and 24 in the Gram form. Nothing waits for the device.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pgolf.ops import backends, checks

Polynomial = tuple[float, float, float]
Coefficients = str | Sequence[Polynomial]

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
AOL = (
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
COEFFICIENTS = ("polar_express", "quintic", "aol")
NORMALIZATIONS = ("frobenius", "row", "aol")

LARGEST_PAIR_GAIN = 20.0  # of two steps on one Gram matrix; the second and third of Polar Express have 16
LARGEST_GAIN = 1000.0  # of a step in float16
LARGEST_VALUE = 16.0  # a singular value between steps in float16

# Of the Triton path on sm_90: sides of the tiles of symmetric products, and when the smaller ones are taken.
LARGE_TILE, SMALL_TILE = 128, 64
MULTIPROCESSORS = 132
SHORT = 512  # length of a product

backends.register("newton_schulz", triton=("cuda",))


def newton_schulz(
    bank: Tensor,
    coefficients: Coefficients = "polar_express",
    steps: int = 5,
    normalize: str = "frobenius",
    out: Tensor | None = None,
) -> Tensor:
    """Replace every matrix X = U S Vᵀ of `bank` by approximately U Vᵀ, the nearest semi-orthogonal matrix.

        X ← X / ‖X‖_F                            singular values in [0, 1]
        G = X Xᵀ,  X ← a X + (b G + c G²) X      each step: s ← a s + b s³ + c s⁵, the same U and V

    In the end all singular values that were not tiny lie in a band around 1, zeros near 0. A zero matrix gives zero;
    scale does not matter; NaN or infinity makes all of its matrix NaN. Error against float64 for 5 steps and singular
    values within a factor of 10: float32 < 1e-5, float16 < 4e-3, bfloat16 < 3e-2, since a small singular value is
    multiplied by up to 1,000, its rounding error with it; and at most 1.1 times that of the plain products in the same
    dtype. float64 is always computed by the reference. Not to be differentiated through.

    Args:
        bank: (M, N) or (B, M, N), wide, tall or square, floating.
        coefficients: (a, b, c) of each step as a list, or a name (band of singular values that were at least so large):
            "polar_express": an optimal polynomial a step, its argument divided by the paper's safety factor 1.01; from
                the eighth step on (1.875, -1.25, 0.375), unscaled (5 steps: 0.87 to 1.13 from 3e-3);
            "quintic": (3.4445, -4.7750, 2.0315) in every step (5 steps: 0.68 to 1.21 from 3e-3);
            "aol": four polynomials with a small gain for the normalisation of that name (0.97 to 1.15 from 1e-2).
        steps: 1 to 100; not used with "aol" or a list.
        normalize: "frobenius", as above; "row", each row to length 1, then Frobenius; "aol", each row of the short side
            divided by sqrt(Σ_j |G|_ij), so that four steps do what five did, but U and V change.
        out: where to write the result, like bank; may be bank itself.
    Returns:
        `out`, or a new contiguous tensor of the shape and dtype of bank.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device, name or number that is not accepted.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> ops.newton_schulz(torch.randn(22, 64, 32)).shape
        torch.Size([22, 64, 32])

    Sources: Muon, kellerjordan.github.io/posts/muon; Polar Express, arXiv 2505.16932; "aol", Turbo-Muon, arXiv
    2512.04632, and YouJiacheng's polynomials; "row", MuonEq, arXiv 2603.28254; the Gram form,
    Dao-AILab/gram-newton-schulz.
    """
    _check(bank, normalize)
    polynomials = step_coefficients(coefficients, steps)
    if out is not None:
        checks.tensor("out", out, (bank.dtype,))
        checks.shape("out", out, bank.shape, "the shape of bank")
        checks.same_device("bank", bank, out=out)
    arguments = (
        [number for triple in polynomials for number in triple],
        normalize,
        backends.choose("newton_schulz", bank.device.type, "float64" if bank.dtype == torch.float64 else ""),
    )
    if out is None:
        return _orthogonalized(bank, *arguments)
    _orthogonalized_into(out, bank, *arguments)
    return out


def newton_schulz_reference(bank: Tensor, polynomials: Sequence[Polynomial], normalize: str = "frobenius") -> Tensor:
    """The definition in plain PyTorch: one step for each (a, b, c) of `polynomials`; bank as for `newton_schulz`."""
    if bank.numel() == 0:
        return torch.empty_like(bank)
    tall = bank.shape[-2] > bank.shape[-1]
    x = _normalized(bank.reshape(-1, *bank.shape[-2:]), normalize)  # (B, M, N)
    for a, b, c in polynomials:
        gram = x.mT @ x if tall else x @ x.mT  # (B, n, n), n = min(M, N)
        # Some CPUs' products leave the result unwritten where alpha is 0.
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.baddbmm(x, *((x, gram) if tall else (gram, x)), beta=a)
    return x.reshape(bank.shape)


def flops(
    rows: int,
    columns: int,
    steps: int = 5,
    coefficients: Coefficients = "polar_express",
    dtype: torch.dtype = torch.bfloat16,
    count: int = 1,
) -> int:
    """Multiplications and additions that the Triton path spends on one matrix (rows, columns) of a bank of `count`.

    Symmetric products count with all of the tiles that are computed, which are larger in large banks. Normalisation
    does not count. The reference spends steps · (4n²m + 2n³).
    """
    n, m = sorted((rows, columns))

    def symmetric(inner: int) -> int:
        tile = tile_side(count, n, inner, dtype)
        return 2 * _tiles(n, tile) * tile * tile * inner

    _, segments = schedule(rows, columns, dtype, step_coefficients(coefficients, steps))
    # A segment of k steps: the Gram matrix, 4k - 3 products of symmetric matrices, and their result times X.
    return sum(symmetric(m) + (4 * k - 3) * symmetric(n) + 2 * n * n * m for k in segments)


def tile_side(count: int, size: int, inner: int, dtype: torch.dtype) -> int:
    """Side of the tiles of a symmetric product (count, size, inner) in the Triton path.

    Small where large ones leave half of the multiprocessors idle, or any of them in a product that is over soon.
    """
    if dtype.itemsize > 2:
        return SMALL_TILE
    large = count * _tiles(size, LARGE_TILE)
    idle = 2 * large <= MULTIPROCESSORS or (large <= MULTIPROCESSORS and inner <= SHORT)
    return SMALL_TILE if idle else LARGE_TILE


def _tiles(size: int, tile: int) -> int:
    side = -(-size // tile)
    return side * (side + 1) // 2


def step_coefficients(coefficients: Coefficients, steps: int) -> tuple[Polynomial, ...]:
    """The (a, b, c) of every step, for a name and a number of steps or for a list."""
    if not isinstance(coefficients, str):
        return _checked(coefficients)
    checks.choice("coefficients", coefficients, COEFFICIENTS)
    checks.integer("steps", steps, 1, 100)
    if coefficients == "quintic":
        return (QUINTIC,) * steps
    if coefficients == "aol":
        return AOL
    s = SAFETY_FACTOR
    scaled = tuple((a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:steps])
    return scaled + (POLAR_EXPRESS_FIXED_POINT,) * (steps - len(scaled))


@lru_cache
def schedule(
    rows: int, columns: int, dtype: torch.dtype, polynomials: tuple[Polynomial, ...]
) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype in which the Triton path iterates, and how many steps (1 or 2) it takes on each Gram matrix.

    Pairs are formed from the end: the first steps enlarge small singular values most, and rounding errors with them.
    """
    singles = (1,) * len(polynomials)
    gains = _gains(polynomials)
    if dtype != torch.bfloat16 or gains is None:
        return dtype, singles
    if max(rows, columns) < 2 * min(rows, columns):
        return torch.float16, singles
    segments: list[int] = []
    left = len(gains)
    while left:
        pair = left >= 2 and math.prod(gains[left - 2 : left]) <= LARGEST_PAIR_GAIN
        segments.insert(0, 2 if pair else 1)
        left -= segments[0]
    return torch.float16, tuple(segments)


def _gains(polynomials: tuple[Polynomial, ...]) -> list[float] | None:
    """The largest factor of a singular value in each step, or None where float16 might be too narrow."""
    gains, top = [], 1.0
    for a, b, c in polynomials:
        values = [top * i / 256 for i in range(257)]
        factors = [abs(a + b * s**2 + c * s**4) for s in values]
        gains.append(max(factors))
        top = max(1.0, *(factor * s for factor, s in zip(factors, values, strict=True)))
        if gains[-1] > LARGEST_GAIN or top > LARGEST_VALUE:
            return None
    return gains


# The operations that the compiler sees. They take the backend as an argument: the choice is made where they are traced.
# `polynomials` are a, b, c of the first step, then of the second, ...


@torch.library.custom_op("pgolf::newton_schulz", mutates_args=())
def _orthogonalized(bank: Tensor, polynomials: Sequence[float], normalize: str, backend: str) -> Tensor:
    result = _computed(bank, polynomials, normalize, backend)
    if result.dtype == bank.dtype and result.is_contiguous():
        return result
    return bank.new_empty(bank.shape).copy_(result)


@_orthogonalized.register_fake
def _(bank: Tensor, polynomials: Sequence[float], normalize: str, backend: str) -> Tensor:
    return bank.new_empty(bank.shape)


@torch.library.custom_op("pgolf::newton_schulz_into", mutates_args=("out",))
def _orthogonalized_into(out: Tensor, bank: Tensor, polynomials: Sequence[float], normalize: str, backend: str) -> None:
    out.copy_(_computed(bank, polynomials, normalize, backend))


@_orthogonalized_into.register_fake
def _(out: Tensor, bank: Tensor, polynomials: Sequence[float], normalize: str, backend: str) -> None:
    pass


def _computed(bank: Tensor, polynomials: Sequence[float], normalize: str, backend: str) -> Tensor:
    """The result in new memory, of any float dtype and strides."""
    _check(bank, normalize)  # again: the operations can be called without the public function
    bank = bank.detach()
    triples = tuple(zip(polynomials[::3], polynomials[1::3], polynomials[2::3], strict=True))
    if backend == "triton" and bank.numel():
        return _by_kernels(bank.view(-1, *bank.shape[-2:]), triples, normalize).view(bank.shape)
    return newton_schulz_reference(bank, triples, normalize)


def _by_kernels(bank: Tensor, polynomials: tuple[Polynomial, ...], normalize: str) -> Tensor:
    from pgolf.triton_kernels.newton_schulz import normalized, symmetric_product  # triton is not on every machine

    def tiled(left: Tensor, right: Tensor, **rest) -> Tensor:
        count, size, inner = left.shape
        return symmetric_product(left, right, tile=tile_side(count, size, inner, left.dtype), **rest)

    _, rows, columns = bank.shape
    dtype, segments = schedule(rows, columns, bank.dtype, polynomials)
    # AOL divides by itself; what it is given must be exact, and within the range of float16 down to small rows.
    x = normalized(bank, dtype, "power of two" if normalize == "aol" else normalize)
    if normalize == "aol":
        _scale_aol(x, tiled)
    x = iterate(x, polynomials, segments, tiled, wide_bits=dtype != bank.dtype)
    return x[:, :rows, :columns]


def iterate(
    x: Tensor,
    polynomials: Sequence[Polynomial],
    segments: Sequence[int],
    symmetric_product: Callable[..., Tensor],
    wide_bits: bool,
    product: Callable[[Tensor, Tensor], Tensor] = torch.bmm,
) -> Tensor:
    """The steps on x (B, M, N), normalised; `segments` says how many are taken on each Gram matrix.

    `wide_bits`: x has bits to spare, so in a single step a times the identity may be rounded together with the rest of
    Z; otherwise a x is added in float32. Products come from `symmetric_product` and `product`.
    """
    tall = x.shape[1] > x.shape[2]
    begin = 0
    for length in segments:
        steps = polynomials[begin : begin + length]
        begin += length
        short_first = x.mT if tall else x
        gram = symmetric_product(short_first, short_first)
        if length == 2:
            apart, z = _pair_of((steps[0], steps[1]), gram, symmetric_product)
        else:
            apart = 0.0 if wide_bits else steps[0][0]
            z = _matrix_of(steps[0], gram, symmetric_product, apart)
        factors = (x, z) if tall else (z, x)
        x = torch.baddbmm(x, *factors, beta=apart) if apart else product(*factors)
    return x


def _matrix_of(step: Polynomial, gram: Tensor, symmetric_product: Callable[..., Tensor], apart: float) -> Tensor:
    """Z - apart I, with Z X the result of the step; gram (B, n, n) is X Xᵀ."""
    a, b, c = step
    return symmetric_product(gram, gram, alpha=c, beta=b, plus=gram, gamma=a - apart)


def _pair_of(
    steps: tuple[Polynomial, Polynomial], gram: Tensor, symmetric_product: Callable[..., Tensor]
) -> tuple[float, Tensor]:
    """(t, R) with t X + R X the result of two steps; gram (B, n, n) is X Xᵀ.

    Z Z' ends between a a' (times the identity, for tiny singular values) and about 1 (for large ones). With half of
    a a' kept apart R is never larger than that half, and so is the rounding error that it brings.
    """
    t, then = (0.5 * step[0] for step in steps)
    r = _matrix_of(steps[0], gram, symmetric_product, apart=t)
    gram = symmetric_product(gram, r, beta=t, plus=gram)
    gram = symmetric_product(r, gram, beta=t, plus=gram)
    last = _matrix_of(steps[1], gram, symmetric_product, apart=then)
    apart = 0.5 * steps[0][0] * steps[1][0]
    both = symmetric_product(r, last, beta=1.0, plus=torch.add(then * r, last, alpha=t), gamma=t * then - apart)
    return apart, both


def _scale_aol(x: Tensor, symmetric_product: Callable[..., Tensor]) -> None:
    """Rescale the short side of x (B, M, N) in place."""
    tall = x.shape[1] > x.shape[2]
    short_first = x.mT if tall else x
    scale = _aol_scale(symmetric_product(short_first, short_first, dtype=torch.float32))
    x.mul_(scale.mT if tall else scale)
    # The Gram matrix is not rescaled with x for the first step: that of the rounded x makes up for its rounding.


def _aol_scale(gram: Tensor) -> Tensor:
    """(Σ_j |G|_ij)^(-1/2) as (B, n, 1)."""
    sums = torch.linalg.vector_norm(gram, 1, dim=-1, keepdim=True)
    return sums.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()  # of a row of zeros the factor is finite


def _normalized(x: Tensor, normalize: str) -> Tensor:
    """x (B, M, N) with no singular value above 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize == "row":
        wide = _unit(wide, (-1,))
    wide = _unit(wide, (-2, -1))
    if normalize == "aol":
        tall = x.shape[1] > x.shape[2]
        scale = _aol_scale(wide.mT @ wide if tall else wide @ wide.mT)
        wide = wide * (scale.mT if tall else scale)
    return wide.to(x.dtype)


def _unit(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """x divided by its norm over some dimensions."""
    x = x / x.abs().amax(dim=over, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm = x.square().sum(dim=over, keepdim=True).sqrt()
    return x / norm.clamp_min(1.0)  # the norm is at least 1 unless all is zero


def _check(bank: Tensor, normalize: str) -> None:
    checks.tensor("bank", bank, checks.FLOATS)
    if bank.ndim not in (2, 3):
        raise ValueError(f"bank: shape {tuple(bank.shape)} is not accepted; expected (M, N) or (B, M, N)")
    checks.choice("normalize", normalize, NORMALIZATIONS)


def _checked(coefficients: Sequence[Polynomial]) -> tuple[Polynomial, ...]:
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
