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


def need(op: str, backend: str, device: str = "cpu") -> None:
    """Skip where a backend cannot run; a build that is there is tested."""
    found = ops.available()[op][backend]
    if not found.ok or f"not on {device}" in found.reason:
        pytest.skip(f"{op}: {backend} on {device}: {found.reason}")
