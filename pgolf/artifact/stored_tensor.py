"""A tensor as an artifact holds it, quantised or float, and the rules that it keeps."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf import ops
from pgolf.artifact.manifest import ORDER_BITS, QUANTIZED_BITS, check_description, order_shape


def dtype_of(bits: int) -> torch.dtype:
    """Of a tensor's values."""
    return {16: torch.float16, 32: torch.float32}.get(bits, torch.int8)


@dataclass(eq=False)
class StoredTensor:
    """A tensor as it lies in the file, quantised or float. All of its numbers are finite.

    A quantised weight is worth values · scale of its row; one of a trellis (2 values - q sgn(values)) · scale, q 0 or 1
    by the path (`ops.trellis_quantize`).

    Attributes:
        name: 1 to 128 characters out of A-Z a-z 0-9 _ . / -, unique in its file.
        role: "embedding", "attention", "mlp" or "control"; the bytes are counted by it.
        shape: of the weights, at most 8 sizes, as (rows, columns).
        values: int8 of shape, within the signed range of bits; or float16 or float32 of shape, for 16 or 32 bits.
        scale: float16 of shape[:-1]; None for floats.
        bits: of a value: 2 to 8 quantised, 16 or 32 for floats.
        order: of a trellis, int8 0..3 of the shape without rows, (columns,) or (count, columns); else None.
        states: of a trellis, 4 or 8; else 0.
    Raises:
        ValueError, TypeError: `dequantize` as `ops.unpack_dequantize`; the rest is checked by `write_artifact`.
    Example:
        >>> import torch
        >>> from pgolf.artifact.file import StoredTensor
        >>> norm = StoredTensor("norm", "control", (16,), torch.ones(16).half(), None, bits=16)
        >>> norm.dequantize().dtype
        torch.float32

    Source: this package; int6 matrices with a float16 scale a row are the challenge's habit.
    """

    name: str
    role: str  # one of ROLES
    shape: tuple[int, ...]
    values: Tensor
    scale: Tensor | None
    bits: int
    order: Tensor | None = None
    states: int = 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, of `shape` and `dtype`, on the device of `values`."""
        if self.scale is None:
            return self.values.to(dtype)
        return dequantize(self.values, self.scale, self.order, self.states, dtype)


def dequantize(
    values: Tensor,  # int8 (..., columns)
    scale: Tensor,  # float16 (...), one a row
    order: Tensor | None = None,
    states: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights, of the shape of `values`, which are indices of a trellis where there is an order of its columns."""
    if not values.numel():
        return torch.empty(values.shape, dtype=dtype, device=values.device)
    if order is not None:
        return ops.trellis_dequantize(values, scale, order, states).to(dtype)
    octets = values.contiguous().view(torch.uint8).reshape(-1)
    rows = (scale.numel(), values.shape[-1])
    return ops.unpack_dequantize(octets, scale.reshape(-1), 8, rows, dtype).reshape(values.shape)


def check_tensor(tensor: StoredTensor) -> None:
    """A ValueError unless it is as its class tells."""
    check_description(tensor.name, tensor.role, tensor.shape, tensor.bits, tensor.states)
    values, scale, quantized = tensor.values, tensor.scale, tensor.bits in QUANTIZED_BITS
    expected: list[tuple[Any, tuple[int, ...], torch.dtype, str]]
    expected = [(values, tensor.shape, dtype_of(tensor.bits), "values")]
    if quantized:
        expected.append((scale, tensor.shape[:-1], torch.float16, "scale"))
    elif scale is not None:
        raise ValueError(f"tensor {tensor.name}: a float tensor has no scale")
    if tensor.states:
        expected.append((tensor.order, order_shape(tensor.shape), torch.int8, "order"))
    elif tensor.order is not None:
        raise ValueError(f"tensor {tensor.name}: only a trellis has an order")
    for part, shape, dtype, what in expected:
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
            came = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"tensor {tensor.name}: {what} must be {dtype} of shape {shape}, not {came}")
        if not part.numel():
            continue
        lowest, highest = (each.item() for each in torch.aminmax(part))  # NaN wins in both, and nothing is copied
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(f"tensor {tensor.name}: {what} must be finite")
        if what == "order" and not 0 <= lowest <= highest < 1 << ORDER_BITS:
            raise ValueError(f"tensor {tensor.name}: order lies in {lowest}..{highest}, accepted are 0 to 3")
        bound = 1 << (tensor.bits - 1)
        if what == "values" and dtype == torch.int8 and not (-bound <= lowest and highest < bound):
            raise ValueError(
                f"tensor {tensor.name}: values lie in {lowest}..{highest}, "
                f"{tensor.bits} bits hold {-bound}..{bound - 1}"
            )
