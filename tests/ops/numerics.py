"""What the tests of operations measure errors with."""

import pytest
import torch
from torch import Tensor

from pgolf import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NO_WORSE = 1.1  # times the error of plain PyTorch in the same dtype


def relative_error(out: Tensor, truth: Tensor) -> float:
    """norm(out - truth) / norm(truth), truth in float64."""
    assert truth.dtype == torch.float64
    assert out.shape == truth.shape, (out.shape, truth.shape)
    assert torch.isfinite(out).all()
    return ((out.double() - truth).norm() / truth.norm()).item()


def assert_no_worse(found: Tensor, plain: Tensor, truth: Tensor, order: float = 0.05) -> None:
    """Within the tolerance of its dtype, and hardly worse than plain PyTorch in it, for any random numbers.

    `order`: share of the tolerance for the order of terms, of a few sums in float32 or float64 (0.05: 4 roundings).
    """
    tolerance, error = TOLERANCE[found.dtype], relative_error(found, truth)
    assert error < tolerance
    by_chance = 2 / found.numel() ** 0.5
    if found.dtype.itemsize < 4 or found.numel() >= 64:
        order = 1e-2
    assert error <= (NO_WORSE + by_chance) * relative_error(plain, truth) + order * tolerance


def need(op: str, backend: str, device: str = "cpu") -> None:
    """Skip where a backend cannot run; a build that is there is tested."""
    found = ops.available()[op][backend]
    if not found.ok or f"not on {device}" in found.reason:
        pytest.skip(f"{op}: {backend} on {device}: {found.reason}")
