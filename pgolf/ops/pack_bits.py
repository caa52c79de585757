"""Integers of 1 to 8 bits, stored without gaps in a stream of bytes, and back.

Exact: every backend gives the same bytes. Least traffic for n values: n + ceil(n·bits/8) bytes each way; on CUDA one
read of n bytes more, for the check of the range, which the CPU's kernel does as it packs; 0 FLOPs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops import backends, checks

backends.register("pack_bits", native=("cpu", "cuda"))
backends.register("unpack_bits", native=("cpu", "cuda"))


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers into a stream of `bits` bits each, without gaps.

        byte_j = Σ over bits b of byte j of  stream_bit(8 j + b) · 2^b

    Value i of n occupies bits [i·bits, (i+1)·bits) of the stream, least significant bit first; bit b of the stream is
    bit b mod 8 of byte b // 8. What is stored are the low `bits` bits, two's complement for signed values, so 8 values
    make exactly `bits` bytes and a stream needs no header. Bits that pad the last byte are zero. Not differentiable.

    Args:
        values: int8 in -2^(bits-1)..2^(bits-1)-1, or uint8 in 0..2^bits-1; (...) of any shape and strides, n values,
            read in row-major order.
        bits: of a value, 1 to 8.
    Returns:
        uint8 (ceil(n·bits/8),) on the device of values.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: bits outside 1..8, or a value that does not fit in them.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> values = torch.arange(-4, 4, dtype=torch.int8)
        >>> packed = ops.pack_bits(values, bits=6)
        >>> packed.shape, torch.equal(ops.unpack_bits(packed, bits=6, shape=8), values)
        (torch.Size([6]), True)

    Source: this package; the layout is the whole of it.
    """
    checks.integer("bits", bits, 1, 8)
    checks.tensor("values", values, (torch.int8, torch.uint8))
    return _pack_bits(values, bits)


def unpack_bits(packed: Tensor, bits: int, shape: int | Sequence[int], signed: bool = True) -> Tensor:
    """Read back what `pack_bits` wrote.

        u_i = (stream >> i·bits) mod 2^bits;   signed: u_i - 2^bits where u_i >= 2^(bits-1)

    The bits that pad the last byte are not looked at. Not differentiable.

    Args:
        packed: uint8 (ceil(n·bits/8),).
        bits: of a value, 1 to 8, as packed.
        shape: shape of the result, with n values.
        signed: int8 with the sign extended, or uint8.
    Returns:
        int8 or uint8 of `shape` on the device of packed.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: bits outside 1..8, a negative size, or a packed size that does not fit the shape.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> packed = ops.pack_bits(torch.tensor([[1, -2], [3, -4]], dtype=torch.int8), bits=3)
        >>> ops.unpack_bits(packed, bits=3, shape=(2, 2)).tolist()
        [[1, -2], [3, -4]]

    Source: this package; the layout is told in `pack_bits`.
    """
    sizes = check_packed(packed, bits, shape)
    if not isinstance(signed, bool):
        raise TypeError(f"signed: expected a bool, got {type(signed).__name__}")
    return _unpack_bits(packed, bits, sizes, signed)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def check_packed(packed: Tensor, bits: int, shape: int | Sequence[int]) -> list[int]:
    """Check a packed stream against the shape that it should have when unpacked; returns the shape as a list."""
    checks.integer("bits", bits, 1, 8)
    checks.tensor("packed", packed, (torch.uint8,))
    sizes = [shape] if isinstance(shape, (int, torch.SymInt)) else list(shape)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"shape: expected ints, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"shape: {tuple(sizes)} is not accepted; sizes must be 0 or more")
    if packed.ndim != 1:
        raise ValueError(f"packed: shape {tuple(packed.shape)} is not accepted; expected one dimension")
    expected = packed_size(math.prod(sizes), bits)
    if packed.shape[0] != expected:
        raise ValueError(
            f"packed: {packed.shape[0]} bytes, expected {expected} for shape {tuple(sizes)} at {bits} bits a value"
        )
    return sizes


def pack_bits_reference(values: Tensor, bits: int) -> Tensor:
    """The definition in plain PyTorch; arguments as for `pack_bits`."""
    flat = values.reshape(-1).view(torch.uint8)
    count = flat.numel()
    groups = torch.nn.functional.pad(flat, (0, -count % 8)).reshape(-1, 8).long() & (2**bits - 1)  # (ceil(n/8), 8)
    word = torch.zeros_like(groups[:, 0])  # 8 values, 8·bits <= 64 bits
    for i in range(8):
        word |= groups[:, i] << i * bits
    octets = torch.stack([word >> 8 * j & 255 for j in range(bits)], dim=1)  # (ceil(n/8), bits)
    return octets.to(torch.uint8).reshape(-1)[: packed_size(count, bits)].clone()


def unpack_bits_reference(packed: Tensor, bits: int, shape: int | Sequence[int], signed: bool = True) -> Tensor:
    """The definition in plain PyTorch; arguments as for `unpack_bits`."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    groups = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits).long()  # (ceil(n/8), bits)
    word = torch.zeros_like(groups[:, 0])
    for j in range(bits):
        word |= groups[:, j] << 8 * j
    values = torch.stack([word >> i * bits & (2**bits - 1) for i in range(8)], dim=1)  # (ceil(n/8), 8)
    if signed:
        half = 2 ** (bits - 1)
        values = (values ^ half) - half
    flat = values.to(torch.int8 if signed else torch.uint8).reshape(-1)
    return flat[: math.prod(sizes)].reshape(sizes).clone()


@torch.library.custom_op("pgolf::pack_bits", mutates_args=())
def _pack_bits(values: Tensor, bits: int) -> Tensor:
    checks.integer("bits", bits, 1, 8)  # again: this operation can be called without the public function
    checks.tensor("values", values, (torch.int8, torch.uint8))
    if backends.choose("pack_bits", values.device.type) == "reference":
        _check_range(values, bits)
        return pack_bits_reference(values, bits)
    values = values.contiguous()
    packed = values.new_empty(packed_size(values.numel(), bits), dtype=torch.uint8)
    if values.is_cuda:
        _check_range(values, bits)
        _run_native("pack_bits", values, packed, values.numel(), bits)
    elif not _run_native("pack_bits", values, packed, values.numel(), bits, values.dtype == torch.int8):
        _check_range(values, bits)
    return packed


@_pack_bits.register_fake
def _(values: Tensor, bits: int) -> Tensor:
    return values.new_empty(packed_size(values.numel(), bits), dtype=torch.uint8)


@torch.library.custom_op("pgolf::unpack_bits", mutates_args=())
def _unpack_bits(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    check_packed(packed, bits, shape)  # again: this operation can be called without the public function
    if backends.choose("unpack_bits", packed.device.type) == "reference":
        return unpack_bits_reference(packed, bits, shape, signed)
    packed = packed.contiguous()
    values = packed.new_empty(shape, dtype=torch.int8 if signed else torch.uint8)
    _run_native("unpack_bits", packed, values, values.numel(), bits, signed)
    return values


@_unpack_bits.register_fake
def _(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    return packed.new_empty(shape, dtype=torch.int8 if signed else torch.uint8)


def _check_range(values: Tensor, bits: int) -> None:
    """Refuse values that do not fit in `bits` bits, by name."""
    if bits == 8 or values.numel() == 0:
        return
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if values.dtype == torch.int8 else (0, 2**bits - 1)
    least, most = (value.item() for value in torch.aminmax(values))
    if least < low or most > high:
        raise ValueError(
            f"values: {least if least < low else most} does not fit in {bits} bits; "
            f"accepted for {str(values.dtype).removeprefix('torch.')} are {low} to {high}"
        )


def _run_native(name: str, source: Tensor, target: Tensor, count: int, *arguments: int) -> bool | None:
    """Run a function of the extension from one contiguous tensor into another, on their device."""
    if source.device.type == "cuda":
        with torch.cuda.device(source.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(backends.native(), f"{name}_cuda")(source.data_ptr(), target.data_ptr(), count, *arguments, stream)
        return None
    function = getattr(backends.native(), name)
    return function(source.data_ptr(), target.data_ptr(), count, *arguments, threads=torch.get_num_threads())
