"""Cross-entropy of soft-capped logits and its gradient, a row a program, the logits read once and written once.

    e = exp(2x/c),  r = 1/(1 + e):    c·tanh(x/c) = c - 2c·r,    d tanh(x/c)·c / dx = 4·r·(1 - r)
    w = exp(c - 2c·r),  S = Σ w:      loss = log(S / w_target),  gradient = (w/S - onehot)·4·r·(1 - r)·scale

The cap bounds w by exp(c) <= exp(64), so nothing is shifted and no running maximum is kept. Two values share one
reciprocal: with a = 1 + e_0 and b = 1 + e_1, 1/a = b·(1/ab) and 1/b = a·(1/ab), so a value costs 2.5 operations of the
special function unit and not 3, which alone would take as long as the memory does. Exponents of e are held at 62, so
that ab is finite; from there on the capped logit is exactly c, and the slope 2^-60 where it should be less.

The partners lie half a block apart, which keeps accesses 16 bytes wide. Of a row that fits one block nothing is read
twice: the products w·r·(1 - r) wait in registers for S. The target is subtracted by one store of its own after a
barrier, not by a comparison for every value. Rows whose target is `ignore_index` are not read. A target that is out of
range is never an address: its load and store are masked, and the device assertion ends the kernel.

Floor for T rows of V logits: 2·T·V·sizeof(logit) + 8·T + 4·T bytes: 3.22 GB at 98,304 x 8,192 in bfloat16, 0.67 ms at
4.8 TB/s, and 2.5·T·V special functions at 16 a cycle and multiprocessor, 0.54 ms on 132 at 1.755 GHz.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.variants import Variant, architecture


@dataclass(frozen=True)
class Launch:
    largest_block: int  # longer rows are read twice, in blocks of this size
    values_per_thread: int
    # Of a thread that holds so many values of a whole row and writes their gradient. Left to itself, the assembler of
    # Triton 3.7 takes 80 and spills two; those of 3.6 and 3.9 take 96.
    gradient_registers: int | None = None


LAUNCHES = {90: Launch(largest_block=16384, values_per_thread=64, gradient_registers=96)}
SAFE_LAUNCH = Launch(largest_block=8192, values_per_thread=32)
# The assertion is compiled in with `debug`, which by itself would also check every addition of integers.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}
RESCALE_BLOCK = 4096
RESCALE_PROGRAMS = 8  # a multiprocessor: so few that a launch which changes nothing ends at once


@triton.jit
def reciprocal(x, ASSEMBLY: tl.constexpr):
    """1/x for x in 1..2^125; the division of the language scales its operands for a range that is not needed."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def product(x, y, ASSEMBLY: tl.constexpr):
    """x·y, computed here: the compiler would keep both factors in registers until the sum of the row is known."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, False, 1)
    else:
        return x * y


@triton.jit
def weigh_target(x, to_exponent, softcap):
    """capped, r·(1 - r) and w of one logit, which counts as much as all others: e·r² is exact where r is near 1."""
    e = tl.exp2(tl.minimum(x * to_exponent, 62.0, tl.PropagateNan.ALL))
    r = 1.0 / (1.0 + e)
    top = softcap * 1.4426950408889634
    return softcap - 2.0 * softcap * r, e * r * r, tl.exp2(top - (2.0 * top) * r)


@triton.jit
def load_pair(row_ptr, column, classes, HALF: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        first = tl.load(row_ptr + column)
        second = tl.load(row_ptr + column + HALF)
    else:
        first = tl.load(row_ptr + column, mask=column < classes, other=0.0)
        second = tl.load(row_ptr + column + HALF, mask=column + HALF < classes, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pair(row_ptr, column, classes, first, second, HALF: tl.constexpr, EVEN: tl.constexpr):
    first = first.to(row_ptr.dtype.element_ty)
    second = second.to(row_ptr.dtype.element_ty)
    if EVEN:
        tl.store(row_ptr + column, first)
        tl.store(row_ptr + column + HALF, second)
    else:
        tl.store(row_ptr + column, first, mask=column < classes)
        tl.store(row_ptr + column + HALF, second, mask=column + HALF < classes)


@triton.jit
def weigh_pair(x0, x1, column, classes, to_exponent, softcap, HALF, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """r and w of two blocks of logits; w is 0 outside the row."""
    a = 1.0 + tl.exp2(tl.minimum(x0 * to_exponent, 62.0, tl.PropagateNan.ALL))
    b = 1.0 + tl.exp2(tl.minimum(x1 * to_exponent, 62.0, tl.PropagateNan.ALL))
    shared = reciprocal(a * b, ASSEMBLY)
    r0 = b * shared
    r1 = a * shared
    top = softcap * 1.4426950408889634
    w0 = tl.exp2(top - (2.0 * top) * r0)
    w1 = tl.exp2(top - (2.0 * top) * r1)
    if not EVEN:
        w0 = tl.where(column < classes, w0, 0.0)
        w1 = tl.where(column + HALF < classes, w1, 0.0)
    return r0, r1, w0, w1


@triton.jit
def softcapped_cross_entropy_kernel(
    logits_ptr,  # floating [rows, classes]
    targets_ptr,  # int64 or int32 [rows]
    scale_ptr,  # float32 [rows] or [1]; read with GRADIENT
    losses_ptr,  # float32 [rows]
    gradient_ptr,  # as logits; may be the memory of the logits; written with GRADIENT
    logits_stride,  # from row to row
    gradient_stride,
    scale_stride,  # 1 or 0
    classes,
    to_exponent,  # 2·log2(e) / softcap
    softcap,
    ignore_index,
    HALF: tl.constexpr,  # half a block
    ONE_BLOCK: tl.constexpr,  # classes <= 2·HALF
    EVEN: tl.constexpr,  # classes is a multiple of 2·HALF
    GRADIENT: tl.constexpr,
    ASSEMBLY: tl.constexpr,  # not in the interpreter
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    inside = (target >= 0) & (target < classes)
    tl.device_assert(
        inside | (target == ignore_index),
        "softcapped_cross_entropy: a target is outside 0..V-1 and is not ignore_index",
    )
    logits_row = logits_ptr + row * logits_stride
    gradient_row = gradient_ptr + row * gradient_stride
    column = tl.arange(0, HALF)

    if counts:
        # Read before the row is written, which may be the same memory.
        logit = tl.load(logits_row + target, mask=inside, other=float("nan")).to(tl.float32)
        target_capped, target_slope, target_w = weigh_target(logit, to_exponent, softcap)
        if ONE_BLOCK:
            x0, x1 = load_pair(logits_row, column, classes, HALF, EVEN)
            r0, r1, w0, w1 = weigh_pair(x0, x1, column, classes, to_exponent, softcap, HALF, EVEN, ASSEMBLY)
            g0 = product(w0, r0 - r0 * r0, ASSEMBLY)
            g1 = product(w1, r1 - r1 * r1, ASSEMBLY)
            total = tl.sum(w0 + w1, 0)
        else:
            partial = tl.zeros((HALF,), tl.float32)
            for start in range(0, classes, 2 * HALF):
                x0, x1 = load_pair(logits_row, start + column, classes, HALF, EVEN)
                r0, r1, w0, w1 = weigh_pair(x0, x1, start + column, classes, to_exponent, softcap, HALF, EVEN, ASSEMBLY)
                partial += w0 + w1
            total = tl.sum(partial, 0)

        ratio = total / target_w
        # Above exp(88) the ratio is not finite, and the difference of logarithms is as exact as a loss of 88 needs.
        small = ratio < 1e38
        loss = tl.log(tl.where(small, ratio, total)) - tl.where(small, 0.0, target_capped)
        tl.store(losses_ptr + row, loss)

        if GRADIENT:
            scale = 4.0 * tl.load(scale_ptr + row * scale_stride)
            factor = scale / total
            if ONE_BLOCK:
                store_pair(gradient_row, column, classes, g0 * factor, g1 * factor, HALF, EVEN)
            else:
                for start in range(0, classes, 2 * HALF):
                    x0, x1 = load_pair(logits_row, start + column, classes, HALF, EVEN)
                    r0, r1, w0, w1 = weigh_pair(
                        x0, x1, start + column, classes, to_exponent, softcap, HALF, EVEN, ASSEMBLY
                    )
                    g0 = w0 * (r0 - r0 * r0) * factor
                    g1 = w1 * (r1 - r1 * r1) * factor
                    store_pair(gradient_row, start + column, classes, g0, g1, HALF, EVEN)
            at_target = (target_w / total - 1.0) * target_slope * scale
            tl.debug_barrier()  # the row is written by other threads
            tl.store(gradient_row + target, at_target.to(gradient_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((HALF,), tl.float32)
            if ONE_BLOCK:
                store_pair(gradient_row, column, classes, zero, zero, HALF, EVEN)
            else:
                for start in range(0, classes, 2 * HALF):
                    store_pair(gradient_row, start + column, classes, zero, zero, HALF, EVEN)


@triton.jit
def rescale_kernel(
    tensor_ptr,  # floating [count], multiplied in place
    factor_ptr,  # float32 [1]
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            position = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(tensor_ptr + position, mask=position < count)
            value = (value.to(tl.float32) * factor).to(tensor_ptr.dtype.element_ty)
            tl.store(tensor_ptr + position, value, mask=position < count)


def launch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float,
    ignore_index: int,
    scale: Tensor | None = None,
    gradient: Tensor | None = None,
    largest_block: int | None = None,
) -> None:
    """Fill `losses` (T,) float32 and, where given, `gradient` (T, V) for `scale` (T,) or (1,) float32.

    logits (T, V) float16, bfloat16 or float32 with neighbouring columns; gradient the same, and it may be the same
    memory; targets (T,) int64 or int32, contiguous. `largest_block`, a power of two, is for tests.
    """
    rows, classes = logits.shape
    if rows == 0:
        return
    config = LAUNCHES.get(architecture(logits.device), SAFE_LAUNCH)
    registers = _registers(classes, config, gradient is not None)
    written = logits if gradient is None else gradient
    with torch.cuda.device_of(logits):
        softcapped_cross_entropy_kernel[(rows,)](
            logits,
            targets,
            losses if scale is None else scale,
            losses,
            written,
            logits.stride(0),
            written.stride(0),
            0 if scale is None or scale.numel() == 1 else 1,
            classes,
            2 / math.log(2) / softcap,
            softcap,
            ignore_index,
            GRADIENT=gradient is not None,
            ASSEMBLY=logits.device.type == "cuda",
            **_blocks(classes, largest_block or config.largest_block),
            num_warps=_warps(classes, config),
            **({"maxnreg": registers} if registers else {}),
            **OPTIONS,
        )


def rescale(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a float32 scalar on its device; where that is 1, memory is left alone."""
    if tensor.numel() == 0:
        return
    blocks = triton.cdiv(tensor.numel(), RESCALE_BLOCK)
    with torch.cuda.device_of(tensor):
        rescale_kernel[(min(blocks, RESCALE_PROGRAMS * _multiprocessors(tensor.device)),)](
            tensor, factor, tensor.numel(), BLOCK=RESCALE_BLOCK, num_warps=4
        )


def _blocks(classes: int, largest: int) -> dict[str, int | bool]:
    block = min(max(triton.next_power_of_2(classes), 64), largest)
    return {"HALF": block // 2, "ONE_BLOCK": classes <= block, "EVEN": classes % block == 0}


def _warps(classes: int, config: Launch) -> int:
    block = min(triton.next_power_of_2(classes), config.largest_block)
    return max(block // (32 * config.values_per_thread), 1)


def _registers(classes: int, config: Launch, gradient: bool) -> int | None:
    """Of a thread at most; None: as the compiler likes. Rows with masks, or in several blocks, need others."""
    full = classes == 32 * config.values_per_thread * _warps(classes, config) <= config.largest_block
    return config.gradient_registers if gradient and full else None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _variant(rows: int, classes: int, gradient: bool, note: str = "") -> Variant:
    config = LAUNCHES[90]
    logits = rows * classes
    names = softcapped_cross_entropy_kernel.arg_names
    types = {
        "logits_ptr": "*bf16",
        "targets_ptr": "*i64",
        "scale_ptr": "*fp32",
        "losses_ptr": "*fp32",
        "gradient_ptr": "*bf16",
        "to_exponent": "fp32",
        "softcap": "fp32",
    }
    constexprs = {"GRADIENT": gradient, "ASSEMBLY": True, **_blocks(classes, config.largest_block)}
    return Variant(
        name=f"softcapped_cross_entropy {'forward + gradient' if gradient else 'forward'} bf16 {rows}x{classes}{note}",
        kernel=softcapped_cross_entropy_kernel,
        signature={name: "constexpr" if name in constexprs else types.get(name, "i32") for name in names},
        constexprs=constexprs,
        num_warps=_warps(classes, config),
        num_stages=3,
        registers=_registers(classes, config, gradient),
        programs=rows,
        bytes_moved=(2 if gradient else 1) * 2 * logits + 8 * rows + 4 * rows,
        flops=(14 if gradient else 9) * logits,
        aligned=(*(name for name in names if name.endswith("_ptr")), "logits_stride", "gradient_stride", "classes"),
        debug=True,
    )


def _rescale_variant(rows: int, classes: int) -> Variant:
    programs = RESCALE_PROGRAMS * 132
    return Variant(
        name=f"softcapped_cross_entropy rescale by 1: reads the factor, leaves bf16 {rows}x{classes} alone",
        kernel=rescale_kernel,
        signature={"tensor_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": RESCALE_BLOCK},
        num_warps=4,
        num_stages=3,
        programs=programs,
        bytes_moved=4,
        flops=programs,  # the comparison with 1
        aligned=("tensor_ptr", "factor_ptr", "count"),
    )


VARIANTS = [
    _variant(98304, 8192, True),
    _variant(98304, 8192, False),
    _variant(1536, 8192, True, " (a chunk of linear_softcapped_cross_entropy, in the L2)"),
    _variant(98304, 1024, True),
    _rescale_variant(98304, 8192),
]
