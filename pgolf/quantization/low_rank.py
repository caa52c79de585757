"""Low-rank correction of quantised matrices (LQER): W ≈ Q + L R, with L (rows, rank) and R (rank, columns) of few bits.

For a matrix with rounding error E = W - Q and second moments H = C Cᵀ of its inputs, the product of rank r that makes
tr((E - L R) H (E - L R)ᵀ) least has the first r left singular vectors of E C as its L. L is rounded first, R is then
fitted to it by least squares, and rounded. The LQER_TOP_K matrices with the largest ‖E‖ of the whole model get one, as
in the records (#1530, #1855, which take the singular vectors of E itself).

In the artifact they are tensors of their own: `<name>.<i>.left` (rank, rows), which is Lᵀ, and `<name>.<i>.right`
(rank, columns), of matrix i of bank `name`, with a scale for each vector.
Source: Zhang et al., LQER, arXiv 2402.02446.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from pgolf.artifact import StoredTensor
from pgolf.quantization.quantizers import rtn
from pgolf.settings import Settings

_FACTOR = re.compile(r"(.+)\.(\d{1,4})\.(left|right)")
_CLIP_SIGMAS = {2: 1.2, 3: 1.95, 4: 2.45, 5: 2.9, 6: 3.25, 7: 3.6, 8: 3.9}  # the best step for Gaussian vectors


def corrections(
    weights: dict[str, Tensor], stored: Iterable[StoredTensor], hessians: dict[str, Tensor], settings: Settings
) -> list[StoredTensor]:
    """The factors, in pairs. `weights` (rows, columns) or banks of them and `hessians` (count, columns, columns)."""
    found = []
    for tensor in stored:
        if tensor.scale is not None:
            errors = weights[tensor.name].float() - tensor.dequantize()
            errors = errors.reshape(-1, *errors.shape[-2:])
            found += [(float(error.norm()), tensor, index, error) for index, error in enumerate(errors)]
    found.sort(key=lambda each: -each[0])
    factors = []
    for norm, tensor, index, error in found[: settings.lqer_top_k]:
        if norm == 0:
            continue
        pair = _factors(error, hessians[tensor.name][index], settings)
        for side, (values, scale) in zip(("left", "right"), pair, strict=True):
            name, shape = f"{tensor.name}.{index}.{side}", tuple(values.shape)
            factors.append(StoredTensor(name, tensor.role, shape, values, scale, settings.lqer_factor_bits))
    return factors


def _factors(error: Tensor, hessian: Tensor, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """(values, scale) of Lᵀ and of R."""
    bits = settings.lqer_factor_bits
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    damped = (hessian / mean).double()
    damped.diagonal().add_(settings.gptq_damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    weighted = error.double() if failed else error.double() @ lower
    rank = min(settings.lqer_rank, *error.shape)
    left = torch.linalg.svd(weighted, full_matrices=False)[0].mT[:rank]  # (rank, rows)
    rounded = rtn(left.float(), hessian, bits, _CLIP_SIGMAS[bits], settings.gptq_damping)
    right = torch.linalg.lstsq(rounded.dequantize().double().mT, error.double()).solution
    fitted = rtn(right.float(), hessian, bits, _CLIP_SIGMAS[bits], settings.gptq_damping)
    return [(each.values, each.scale) for each in (rounded, fitted)]


def corrected_by(name: str) -> str | None:
    """The bank that a factor of this name corrects; None where it is no factor."""
    match = _FACTOR.fullmatch(name)
    return match[1] if match else None


def add_corrections(weights: dict[str, Tensor], factors: dict[str, StoredTensor]) -> None:
    """Add every L R to its matrix in `weights`, in place; a ValueError names a factor that does not fit."""
    for name in sorted(factors):
        match = _FACTOR.fullmatch(name)
        assert match
        of, index, side = match[1], int(match[2]), match[3]
        other = f"{of}.{match[2]}.{'right' if side == 'left' else 'left'}"
        if of not in weights or weights[of].ndim not in (2, 3) or other not in factors:
            raise ValueError(f"{name}: corrects no matrix of this model, or {other} is missing")
        if side == "right":
            continue
        matrices = weights[of].view(-1, *weights[of].shape[-2:])
        left, right = (factors[each].dequantize() for each in (name, other))
        fits = left.ndim == right.ndim == 2 and len(left) == len(right) and index < len(matrices)
        if not fits or (left.shape[1], right.shape[1]) != matrices.shape[1:]:
            raise ValueError(
                f"{name}: {tuple(left.shape)} and {tuple(right.shape)} do not correct matrix {index} of "
                f"{tuple(weights[of].shape)}"
            )
        matrices[index] += left.mT @ right
