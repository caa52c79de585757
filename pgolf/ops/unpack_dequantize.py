"""Packed integers times one scale a row: the weights of an artifact as a matrix to compute with.

Least traffic: n·bits/8 + rows·sizeof(scale) + n·sizeof(dtype) bytes; n FLOPs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.pack_bits import check_packed, unpack_bits, unpack_bits_reference

backends.register("unpack_dequantize", triton=("cuda",), native=("cpu", "cuda"))


def unpack_dequantize(packed: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Unpack signed integers and multiply each row by its scale.

        out[r, c] = value(r·cols + c) · scale[r],    value(i) the signed integer i of the stream that `pack_bits` wrote

    The product is computed in float32 (float64 where the result is float64) and rounded once to `dtype`; in float32
    every backend gives the same bits. `bits = 8` is plain int8 bytes. Rows follow one another without padding, so a row
    need not begin at a byte. Differentiable in scale: d scale[r] = Σ_c d out[r, c] · value(r, c).

    Args:
        packed: uint8 (ceil(n·bits/8),), as `pack_bits` writes it.
        scale: floating, shape[:-1], on the device of packed.
        bits: of a value, 1 to 8.
        shape: (rows, cols) or (banks, rows, cols), n values.
        dtype: floating dtype of the result.
    Returns:
        `dtype` tensor of `shape` on the device of packed.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: bits outside 1..8, or a shape, size or device that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> packed = ops.pack_bits(torch.randint(-32, 32, (4, 6), dtype=torch.int8), bits=6)
        >>> packed.shape, ops.unpack_dequantize(packed, torch.rand(4), 6, (4, 6), torch.bfloat16).dtype
        (torch.Size([18]), torch.bfloat16)

    Source: this package; a scale a row is how the challenge's entries store their weights.
    """
    sizes = _check(packed, scale, bits, shape, dtype)
    return _unpack_dequantize(packed, scale, bits, sizes, dtype)


def unpack_dequantize_reference(
    packed: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `unpack_dequantize`."""
    return _scaled(unpack_bits_reference(packed, bits, shape), scale, dtype)


@torch.library.custom_op("pgolf::unpack_dequantize", mutates_args=())
def _unpack_dequantize(packed: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check(packed, scale, bits, shape, dtype)  # again: this operation can be called without the public function
    backend = backends.choose("unpack_dequantize", packed.device.type)
    if backend == "reference":
        return unpack_dequantize_reference(packed, scale, bits, shape, dtype)
    if backend == "native":
        return _scaled(unpack_bits(packed, bits, shape), scale, dtype)
    from pgolf.triton_kernels.unpack_dequantize import launch  # here, because triton is not on every machine

    out = scale.new_empty(shape, dtype=dtype)
    launch(packed.contiguous(), scale.contiguous(), out, bits)
    return out


@_unpack_dequantize.register_fake
def _(packed: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return scale.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    packed, scale, bits, shape, _ = inputs
    ctx.save_for_backward(packed)
    ctx.bits, ctx.shape, ctx.scale_dtype = bits, shape, scale.dtype


def _backward(ctx, grad: Tensor):
    (packed,) = ctx.saved_tensors
    wide = torch.promote_types(grad.dtype, torch.float32)
    ones = grad.new_ones(ctx.shape[:-1], dtype=wide)
    values = _unpack_dequantize(packed, ones, ctx.bits, ctx.shape, wide)
    return None, (grad.to(wide) * values).sum(dim=-1).to(ctx.scale_dtype), None, None, None


_unpack_dequantize.register_autograd(_backward, setup_context=_setup_context)


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def _check(packed: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    sizes = check_packed(packed, bits, shape)
    if len(sizes) not in (2, 3):
        raise ValueError(f"shape: {tuple(sizes)} is not accepted; expected (rows, cols) or (banks, rows, cols)")
    checks.tensor("scale", scale, checks.FLOATS)
    checks.shape("scale", scale, tuple(sizes[:-1]), "one scale a row: shape without its last size")
    checks.same_device("packed", packed, scale=scale)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: {dtype} is not accepted; accepted are float16, bfloat16, float32, float64")
    return sizes
