"""The reference backend of an operation: its definition, computed in float32 or wider and rounded once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_full(definition: Callable[..., Any], *arguments: Any) -> Any:
    """The results of `definition`, computed in float32 or wider, in the dtype of the first floating argument."""
    dtype = next(value.dtype for value in arguments if _is_floating(value))
    results = definition(*(widened(value) if _is_floating(value) else value for value in arguments))
    return _rounded(results, dtype) if isinstance(results, Tensor) else tuple(_rounded(each, dtype) for each in results)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous()
