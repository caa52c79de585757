"""Packed integers of 1 to 8 bits times one scale a row, in one pass over memory.

    out[i] = value(i) · scale[i // columns],    value(i) = bits [i·BITS, (i+1)·BITS) of the stream, sign-extended

Eight values are BITS whole bytes: a group. One lane reads the bytes of a group into a word of 32 bits (BITS <= 4) or
64, shifts each of the eight values to the top and back down, which extends the sign, and writes eight neighbouring
results, which is one access of 16 bytes in bfloat16. Where `columns` is a multiple of 8 a group lies in one row and
finds its scale with one division; else each value does.

Floor for n values in r rows: n·BITS/8 + r·sizeof(scale) + n·sizeof(out) bytes, each once, and n FLOPs. It is bound by
memory: 5.8 million int6 values to bfloat16 are 15.9 MB, 3.3 µs at 4.8 TB/s.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.variants import Variant, architecture


@dataclass(frozen=True)
class Launch:
    groups: int  # groups of 8 values a program
    num_warps: int


LAUNCHES = {90: Launch(groups=256, num_warps=8)}
SAFE_LAUNCH = Launch(groups=128, num_warps=4)


@triton.jit
def unpack_dequantize_kernel(
    packed_ptr,  # uint8 [ceil(count * BITS / 8)]
    scale_ptr,  # floating [count / columns]
    out_ptr,  # floating [count]
    count,
    columns,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_IN_ROW: tl.constexpr,  # columns % 8 == 0
):
    WORD: tl.constexpr = tl.int32 if BITS <= 4 else tl.int64
    WIDTH: tl.constexpr = 32 if BITS <= 4 else 64
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if OUT.is_fp64() else tl.float32

    start = tl.program_id(0).to(tl.int64) * (GROUPS * 8)  # the first value of this program
    first_row = start // columns
    first_column = (start - first_row * columns).to(tl.int32)
    group = tl.arange(0, GROUPS)
    lane = tl.arange(0, 8)

    octet = start // 8 * BITS + group * BITS
    octets = (tl.cast(count, tl.int64) * BITS + 7) // 8  # a count of 1 arrives as a Python number
    word = tl.zeros((GROUPS,), dtype=WORD)
    for j in tl.static_range(BITS):
        byte = tl.load(packed_ptr + octet + j, mask=octet + j < octets, other=0)
        word |= byte.to(WORD) << (8 * j)
    value = (word[:, None] << (WIDTH - BITS - BITS * lane)[None, :].to(WORD)) >> (WIDTH - BITS)
    value = value.to(tl.int32)  # 64-bit integers become floats at a quarter of the speed

    position = group[:, None] * 8 + lane[None, :]
    inside = start + position < count
    if GROUP_IN_ROW:
        row = (first_column + group * 8) // columns
        scale = tl.load(scale_ptr + first_row + row, mask=start + group * 8 < count, other=0.0)[:, None]
    else:
        row = (first_column + position) // columns
        scale = tl.load(scale_ptr + first_row + row, mask=inside, other=0.0)
    tl.store(out_ptr + start + position, (value.to(WIDE) * scale.to(WIDE)).to(OUT), mask=inside)


def launch(packed: Tensor, scale: Tensor, out: Tensor, bits: int) -> None:
    """Fill `out` (..., columns), floating; packed uint8 [ceil(n·bits/8)], scale floating (...). All contiguous."""
    count, columns = out.numel(), out.shape[-1]
    if count == 0:
        return
    config = LAUNCHES.get(architecture(out.device), SAFE_LAUNCH)
    grid = (triton.cdiv(count, 8 * config.groups),)
    with torch.cuda.device_of(out):
        unpack_dequantize_kernel[grid](
            packed,
            scale,
            out,
            count,
            columns,
            BITS=bits,
            GROUPS=config.groups,
            GROUP_IN_ROW=columns % 8 == 0,
            num_warps=config.num_warps,
        )


def _variant(bits: int, banks: int, rows: int, columns: int) -> Variant:
    config = LAUNCHES[90]
    count = banks * rows * columns
    return Variant(
        name=f"unpack_dequantize int{bits} -> bf16 {banks}x{rows}x{columns}",
        kernel=unpack_dequantize_kernel,
        signature={
            "packed_ptr": "*u8",
            "scale_ptr": "*fp16",
            "out_ptr": "*bf16",
            "count": "i32",
            "columns": "i32",
            "BITS": "constexpr",
            "GROUPS": "constexpr",
            "GROUP_IN_ROW": "constexpr",
        },
        constexprs={"BITS": bits, "GROUPS": config.groups, "GROUP_IN_ROW": columns % 8 == 0},
        num_warps=config.num_warps,
        num_stages=3,
        programs=triton.cdiv(count, 8 * config.groups),
        bytes_moved=count * bits // 8 + banks * rows * 2 + count * 2,
        flops=count,
        aligned=("packed_ptr", "scale_ptr", "out_ptr", "count", "columns"),
    )


VARIANTS = [
    _variant(6, 22, 512, 512),
    _variant(6, 11, 512, 2048),
    _variant(8, 1, 8192, 512),
    _variant(4, 22, 512, 512),
]
