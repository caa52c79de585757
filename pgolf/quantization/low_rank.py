"""Low-rank correction of quantised matrices (LQER): W ≈ Q + L R, with L (rows, rank) and R (rank, columns) of few bits.

For a matrix with rounding error E = W - Q and second moments H = C Cᵀ of its inputs, the product of rank r that makes
tr((E - L R) H (E - L R)ᵀ) least has the first r left singular vectors of E C as its L. L is rounded first, R is then
fitted to it by least squares, and rounded. The LQER_TOP_K matrices with the largest ‖E‖ of the whole model get one, as
in the records (#1530, #1855, which take the singular vectors of E itself).

How an artifact holds them, and how they are added: pgolf/artifact/corrections.py.
Source: Zhang et al., LQER, arXiv 2402.02446.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pgolf.artifact import StoredTensor
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.quantizers import rtn

_CLIP_SIGMAS = {2: 1.2, 3: 1.95, 4: 2.45, 5: 2.9, 6: 3.25, 7: 3.6, 8: 3.9}  # the best step for Gaussian vectors


def corrections(
    weights: dict[str, Tensor], stored: Iterable[StoredTensor], hessians: dict[str, Tensor], config: QuantizationConfig
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
    for norm, tensor, index, error in found[: config.lqer_top_k]:
        if norm == 0:
            continue
        pair = _factors(error, hessians[tensor.name][index], config)
        for side, (values, scale) in zip(("left", "right"), pair, strict=True):
            name, shape = f"{tensor.name}.{index}.{side}", tuple(values.shape)
            factors.append(StoredTensor(name, tensor.role, shape, values, scale, config.lqer_factor_bits))
    return factors


def _factors(error: Tensor, hessian: Tensor, config: QuantizationConfig) -> list[tuple[Tensor, Tensor]]:
    """(values, scale) of Lᵀ and of R."""
    bits = config.lqer_factor_bits
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    damped = (hessian / mean).double()
    damped.diagonal().add_(config.damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    weighted = error.double() if failed else error.double() @ lower
    rank = min(config.lqer_rank, *error.shape)
    left = torch.linalg.svd(weighted, full_matrices=False)[0].mT[:rank]  # (rank, rows)
    rounded = rtn(left.float(), hessian, bits, _CLIP_SIGMAS[bits], config.damping)
    right = torch.linalg.lstsq(rounded.dequantize().double().mT, error.double()).solution
    fitted = rtn(right.float(), hessian, bits, _CLIP_SIGMAS[bits], config.damping)
    return [(each.values, each.scale) for each in (rounded, fitted)]
