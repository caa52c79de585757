"""Products that are symmetric, one triangle computed, and the normalisation: the kernels of `newton_schulz`.

    symmetric product:  out = alpha·L Rᵀ + beta·D + gamma·I      L, R (B, n, k), D and out (B, n, n)
    row sums:           largest_r = max |x_r|,  squares_r = Σ (x_r / largest_r)²
    scale:              x / ‖x‖_F, or each row / its norm / sqrt(number of rows that are not zero),
                        or x · 2^j with the largest |x| from 2^14 to 2^15, which is exact

The product is one that mathematics says is symmetric (X Xᵀ, or polynomials of one matrix with each other). Tiles on and
below the diagonal are computed, T(T + 1)/2 of T²; what is below it is stored twice, the second time transposed. So the
result is symmetric to the last bit, which the Gram form needs: with tiles on the diagonal left as they come out, its
error was up to three times as large. L and R come by strides: of a tall X, Xᵀ X is read from X itself.

Floor at n = 512, 22 matrices, 16 bits: 220 tiles of 128 x 128, 3.7 GFLOP, 4 us at 989 TFLOP/s; 23 MB to and from
memory, or from the L2 cache (60 MB on an H200), where most of it stays between launches. A matrix does not fit a
multiprocessor (512 KB and 256 KB against 227 KB of shared memory), so the iteration cannot stay on chip: each
product needs all of the one before, and a product is a launch.

A program computes one tile. With 16 bits a step of 64 in k takes the tensor cores 512 cycles for a tile of 128 and 128
cycles for one of 64, and loads 32 and 16 KB, which at 64 bytes a cycle from the L2 cache take 512 and 256 cycles: large
tiles for full banks. The caller chooses. One rank's three matrices are 30 large tiles or 108 small ones, on as many
multiprocessors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.triton_kernels.variants import Variant, architecture


@dataclass(frozen=True)
class Launch:
    block: int  # a tile is block x block
    block_k: int
    num_warps: int
    num_stages: int


# By architecture and bytes an element, one for each size of a tile. float32 is computed without the tensor cores.
LAUNCHES = {
    (90, 2): (Launch(128, 64, 8, 3), Launch(64, 64, 4, 4)),
    (90, 4): (Launch(64, 32, 8, 3),),
}
SAFE_LAUNCH = Launch(64, 32, 8, 2)
HOW = ("frobenius", "row", "power of two")
VALUES = 8192  # of a matrix, in one program of the normalisation
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def symmetric_product_kernel(
    l_desc,  # (B, n, k), or (B, k, n) if TRANSPOSED
    r_desc,  # like l_desc
    d_desc,  # (B, n, n); not read unless ADD
    out_desc,  # (B, n, n)
    size,
    inner,
    alpha,
    beta,
    gamma,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The triangle of T rows of tiles, folded to a rectangle: beside row i of its lower half lies one of the upper half.
    side = tl.cdiv(size, BLOCK)
    width = side | 1
    tiles = side * (side + 1) // 2
    batch = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = side // 2 + tile // width
    column = tile % width
    if column > row:
        column = column - row - 1
        row = side // 2 - 1 - tile // width
    m = row * BLOCK
    n = column * BLOCK

    # Without it Triton 3.6 guards the loop, and for that ptxas has each wgmma wait for the one before (C7515).
    tl.assume(inner > 0)
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, inner, BLOCK_K):
        if TRANSPOSED:
            left = l_desc.load([batch, k, m]).reshape(BLOCK_K, BLOCK).T
            right = r_desc.load([batch, k, n]).reshape(BLOCK_K, BLOCK)
        else:
            left = l_desc.load([batch, m, k]).reshape(BLOCK, BLOCK_K)
            right = r_desc.load([batch, n, k]).reshape(BLOCK, BLOCK_K).T
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    sums *= alpha
    if ADD:
        sums += beta * d_desc.load([batch, m, n]).reshape(BLOCK, BLOCK).to(tl.float32)
    rows = m + tl.arange(0, BLOCK)
    columns = n + tl.arange(0, BLOCK)
    sums += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    result = sums.to(out_desc.dtype)
    if row == column:  # its own mirror image; rounding has not left it symmetric
        result = tl.where(rows[:, None] >= columns[None, :], result, result.T)
    out_desc.store([batch, m, n], result.reshape(1, BLOCK, BLOCK))
    if row != column:
        out_desc.store([batch, n, m], result.T.reshape(1, BLOCK, BLOCK))


@triton.jit
def row_sums_kernel(
    bank_ptr,  # (B, rows, columns) by strides
    largest_ptr,  # (B, rows) float32
    squares_ptr,  # (B, rows) float32
    rows,
    columns,
    stride_b,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_M)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = bank_ptr + batch * stride_b + m.to(tl.int64)[:, None] * stride_m
    largest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for begin in range(0, columns, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        x = tl.load(at + n[None, :] * stride_n, mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=1))
    unit = tl.maximum(largest, TINY)  # an infinity divided by itself is NaN, and a NaN stays one
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for begin in range(0, columns, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        x = tl.load(at + n[None, :] * stride_n, mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0)
        x = x.to(tl.float32) / unit[:, None]
        squares += tl.sum(x * x, axis=1)
    tl.store(largest_ptr + batch * rows + m, largest, mask=m < rows)
    tl.store(squares_ptr + batch * rows + m, squares, mask=m < rows)


@triton.jit
def at_least_one(x):
    return tl.where(x < 1.0, 1.0, x)  # NaN stays NaN, which a maximum would not grant


@triton.jit
def scale_kernel(
    bank_ptr,  # (B, rows, columns) by strides
    largest_ptr,  # (B, rows) float32
    squares_ptr,  # (B, rows) float32
    out_ptr,  # (B, out_rows, out_columns), contiguous; what the bank does not fill becomes 0
    rows,
    columns,
    out_rows,
    out_columns,
    stride_b,
    stride_m,
    stride_n,
    HOW: tl.constexpr,  # 0 by the norm of the matrix, 1 by row, 2 by a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks = tl.cdiv(out_rows, BLOCK_M)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    largest_ptr += batch * rows
    squares_ptr += batch * rows
    top = 0.0
    for begin in range(0, rows, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        top = tl.maximum(top, tl.max(tl.load(largest_ptr + r, mask=r < rows, other=0.0), axis=0))
    top = tl.maximum(top, TINY)
    total = 0.0
    if HOW != 2:
        for begin in range(0, rows, BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            largest = tl.load(largest_ptr + r, mask=r < rows, other=0.0)
            if HOW == 1:
                total += tl.sum(tl.where(largest > 0, 1.0, 0.0), axis=0)
            else:
                share = largest / top
                total += tl.sum(tl.load(squares_ptr + r, mask=r < rows, other=0.0) * share * share, axis=0)
    norm = tl.sqrt(at_least_one(total))
    unit = tl.zeros((BLOCK_M,), dtype=tl.float32) + top
    length = tl.zeros((BLOCK_M,), dtype=tl.float32) + norm
    if HOW == 1:
        unit = tl.maximum(tl.load(largest_ptr + m, mask=m < rows, other=0.0), TINY)
        length *= tl.sqrt(at_least_one(tl.load(squares_ptr + m, mask=m < rows, other=0.0)))
    if HOW == 2:
        unit = (unit.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # its mantissa cleared
        length = tl.zeros((BLOCK_M,), dtype=tl.float32) + 2.0**-14
    at = bank_ptr + batch * stride_b + m.to(tl.int64)[:, None] * stride_m
    out_at = out_ptr + (batch * out_rows + m)[:, None] * out_columns
    for begin in range(0, out_columns, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        x = tl.load(at + n[None, :] * stride_n, mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0)
        x = x.to(tl.float32) / unit[:, None] / length[:, None]
        inside = (m < out_rows)[:, None] & (n < out_columns)[None, :]
        tl.store(out_at + n[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


def normalized(bank: Tensor, dtype: torch.dtype, how: str) -> Tensor:
    """`bank` (B, M, N), any strides, in `dtype`, divided as `HOW` names it; sizes rounded up to multiples of 8.

    The padding is zeros. So rows begin at multiples of 16 bytes, as the copy engine asks, at every later step.
    """
    count, rows, columns = bank.shape
    largest, squares = bank.new_empty(2, count, rows, dtype=torch.float32)
    out = bank.new_empty(count, triton.cdiv(rows, 8) * 8, triton.cdiv(columns, 8) * 8, dtype=dtype)
    blocks = _normalization_blocks(columns)
    programs = count * triton.cdiv(out.shape[1], blocks["BLOCK_M"])
    with torch.cuda.device_of(bank):
        grid = (count * triton.cdiv(rows, blocks["BLOCK_M"]),)
        row_sums_kernel[grid](bank, largest, squares, rows, columns, *bank.stride(), **blocks, num_warps=8)
        scale_kernel[(programs,)](
            bank,
            largest,
            squares,
            out,
            rows,
            columns,
            *out.shape[1:],
            *bank.stride(),
            HOW=HOW.index(how),
            BLOCK_R=min(1024, triton.next_power_of_2(rows)),
            **blocks,
            num_warps=8,
        )
    return out


def symmetric_product(
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    plus: Tensor | None = None,
    gamma: float = 0.0,
    dtype: torch.dtype | None = None,
    tile: int = 128,
) -> Tensor:
    """alpha · left rightᵀ + beta · plus + gamma · I, symmetric by what the operands are. One launch.

    left and right (B, n, k), k > 0, both with rows or both with columns contiguous; plus (B, n, n). float16, bfloat16
    or float32, sums in float32. Result (B, n, n) in `dtype`, else that of left. `tile`: its side, where one can choose.
    """
    count, size, inner = left.shape
    transposed = left.stride(2) != 1 and left.stride(1) == 1
    if transposed:
        left, right = left.mT, right.mT
    step = 16 // left.element_size()
    out = left.new_empty(count, size, triton.cdiv(size, step) * step, dtype=dtype)[:, :, :size]
    launches = LAUNCHES.get((architecture(left.device), left.element_size()), ())
    config = next((launch for launch in launches if launch.block <= tile), SAFE_LAUNCH)
    block = (config.block_k, config.block) if transposed else (config.block, config.block_k)
    left_desc = _descriptor(left, *block)
    out_desc = _descriptor(out, config.block, config.block)
    with torch.cuda.device_of(left):
        symmetric_product_kernel[(count * _tiles(size, config.block),)](
            left_desc,
            left_desc if right is left else _descriptor(right, *block),
            out_desc if plus is None else _descriptor(plus, config.block, config.block),
            out_desc,
            size,
            inner,
            alpha,
            beta,
            gamma,
            num_stages=config.num_stages,
            **_constants(config, left.dtype, transposed, plus is not None),
        )
    return out.contiguous()


def _tiles(size: int, block: int) -> int:
    side = triton.cdiv(size, block)
    return side * (side + 1) // 2


def _constants(config: Launch, dtype: torch.dtype, transposed: bool, add: bool) -> dict:
    return {
        "BLOCK": config.block,
        "BLOCK_K": config.block_k,
        "TRANSPOSED": transposed,
        "ADD": add,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _normalization_blocks(columns: int) -> dict[str, int]:
    block_n = min(1024, triton.next_power_of_2(columns))
    return {"BLOCK_M": VALUES // max(block_n, 64), "BLOCK_N": block_n}


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Of a copy where the copy engine cannot read the tensor itself. What lies outside of a shape is read as 0."""
    count, rows, columns = tensor.shape
    step = 16 // tensor.element_size()
    strides = [tensor.stride(0) if count > 1 else rows * tensor.stride(1), tensor.stride(1), 1]
    if tensor.stride(2) != 1 or strides[0] % step or strides[1] % step or tensor.data_ptr() % 16:
        pitch = triton.cdiv(columns, step) * step
        tensor = tensor.new_empty(count, rows, pitch)[:, :, :columns].copy_(tensor)
        strides = [rows * pitch, pitch, 1]
    return TensorDescriptor(tensor, [count, rows, columns], strides, [1, block_rows, block_columns])


def _product_variant(
    name: str,
    count: int,
    size: int,
    inner: int,
    dtype: torch.dtype = torch.float16,
    transposed: bool = False,
    add: bool = False,
    small: bool = False,
) -> Variant:
    config = LAUNCHES[90, dtype.itemsize][small]
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    block = (config.block_k, config.block) if transposed else (config.block, config.block_k)
    constants = _constants(config, dtype, transposed, add)
    constexprs = {key: value for key, value in constants.items() if key.isupper()}
    operand = f"tensordesc<{kind}[1,{block[0]},{block[1]}]>"
    square = f"tensordesc<{kind}[1,{config.block},{config.block}]>"
    programs = count * _tiles(size, config.block)
    operands = size * inner * (1 if add or name.startswith("gram") else 2)
    return Variant(
        name=f"newton_schulz {name} {kind} {count}x{size}x{inner}, tiles of {config.block}",
        kernel=symmetric_product_kernel,
        signature={
            "l_desc": operand,
            "r_desc": operand,
            "d_desc": square,
            "out_desc": square,
            **dict.fromkeys(("size", "inner"), "i32"),
            **dict.fromkeys(("alpha", "beta", "gamma"), "fp32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        programs=programs,
        bytes_moved=dtype.itemsize * count * (operands + size * size),
        flops=2 * programs * config.block**2 * inner,
        aligned=("size", "inner"),
    )


def _normalization_variant(kernel, count: int, rows: int, columns: int) -> Variant:
    scale = kernel is scale_kernel
    blocks = _normalization_blocks(columns)
    constexprs = {**({"HOW": 0, "BLOCK_R": min(1024, rows)} if scale else {}), **blocks}
    strides = ("stride_b", "stride_m")
    sizes = ("rows", "columns", *(("out_rows", "out_columns") if scale else ()))
    return Variant(
        name=f"newton_schulz {'scale' if scale else 'row sums'} bf16 {count}x{rows}x{columns}",
        kernel=kernel,
        signature={
            "bank_ptr": "*bf16",
            "largest_ptr": "*fp32",
            "squares_ptr": "*fp32",
            **({"out_ptr": "*fp16"} if scale else {}),
            **dict.fromkeys((*sizes, *strides), "i32"),
            "stride_n": "constexpr",
            **({"HOW": "constexpr"} if scale else {}),
            "BLOCK_M": "constexpr",
            "BLOCK_N": "constexpr",
            **({"BLOCK_R": "constexpr"} if scale else {}),
        },
        constexprs={"stride_n": 1, **constexprs},
        num_warps=8,
        num_stages=3,
        programs=count * triton.cdiv(rows, blocks["BLOCK_M"]),
        bytes_moved=count * (rows * columns * (4 if scale else 2) + 8 * rows),
        flops=count * rows * columns * (2 if scale else 4),
        aligned=("bank_ptr", "largest_ptr", "squares_ptr", *(("out_ptr",) if scale else ()), *sizes, *strides),
    )


VARIANTS = [
    _product_variant("gram", 22, 512, 512),
    _product_variant("gram", 22, 256, 512, small=True),
    _product_variant("gram", 11, 512, 2048),
    _product_variant("gram of tall", 11, 512, 2048, transposed=True),
    _product_variant("gram of tall", 3, 512, 2048, transposed=True, small=True),
    _product_variant("aI + bG + cG²", 22, 512, 512, add=True),
    _product_variant("aI + bG + cG²", 11, 512, 512, add=True, small=True),
    _product_variant("aI + bG + cG²", 22, 256, 256, add=True, small=True),
    _product_variant("Z G", 11, 512, 512, small=True),
    _product_variant("Z G", 22, 256, 256, small=True),
    _product_variant("gram", 22, 512, 512, torch.bfloat16),
    _product_variant("bG + cG²", 22, 512, 512, torch.bfloat16, add=True),
    _product_variant("gram", 22, 512, 512, torch.float32),
    _product_variant("bG + cG²", 22, 512, 512, torch.float32, add=True),
    *(
        _normalization_variant(kernel, *bank)
        for kernel in (row_sums_kernel, scale_kernel)
        for bank in ((22, 512, 512), (11, 512, 2048))
    ),
]
