"""Low-rank corrections as an artifact holds them: W ≈ Q + L R (pgolf/quantization/low_rank.py makes them).

They are tensors of their own: `<name>.<i>.left` (rank, rows), which is Lᵀ, and `<name>.<i>.right` (rank, columns), of
matrix i of bank `name`, with a scale for each vector.
"""

import re

from torch import Tensor

from pgolf.artifact.stored_tensor import StoredTensor

_FACTOR = re.compile(r"(.+)\.(\d{1,4})\.(left|right)")


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
