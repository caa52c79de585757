"""Checks of arguments that the operations share: they read only shapes, dtypes and devices, so they cost no launch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: Tensor, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """`value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: dtype {value.dtype} is not accepted; accepted are {accepted}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: layout {value.layout} is not accepted; use a dense tensor")


def same_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    """All tensors are on the device of `first`."""
    for name, other in others.items():
        if other.device != first.device:
            raise ValueError(f"{name}: on {other.device}, but {first_name} is on {first.device}; use one device")


def same_dtype(first_name: str, first: Tensor, **others: Tensor) -> None:
    """All tensors have the dtype of `first`, unless autocast will see to that."""
    if torch.is_autocast_enabled(first.device.type):
        return
    for name, other in others.items():
        if other.dtype != first.dtype:
            raise TypeError(f"{name}: dtype {other.dtype}, but {first_name} is {first.dtype}; use one dtype")


def shape(name: str, value: Tensor, expected: tuple[int, ...], because: str) -> None:
    """`value` has exactly the shape `expected`."""
    if value.shape != expected:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(expected)} ({because})")


def integer(name: str, value: int, low: int, high: int) -> None:
    """`value` is an int from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not accepted; accepted are {low} to {high}")


def number(name: str, value: float) -> None:
    """`value` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not accepted; it must be finite")


def choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """`value` is one of the names `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not accepted; accepted are {', '.join(accepted)}")
