"""The two products of the feed-forward block around its activation, each with the activation in its epilogue.

    up:        z = x w_upᵀ,  a = leaky_relu(z, slope),  hidden = a² with the sign of z in its last mantissa bit
    gradient:  dz = (grad w_down) ⊙ d(a²)/dz,           d(a²)/dz = 2√hidden, times -slope where the bit is set

`hidden` is the one tensor of this size that is kept, and it serves as it is: the other four products of the block
(hidden w_downᵀ, gradᵀ hidden, dz w_up, dzᵀ x) are plain ones, for the library of the device. Storing a instead would
make two of them square an operand on its way to the tensor cores, through registers, which serialises wgmma.

The square is rounded once, from the float32 sum, to a number whose last bit says the sign: an error of at most one unit
in the last place. Rounding z and then a², as plain PyTorch does, costs more: twice a half unit and another half. For
slope 0 no sign is needed, and a² is rounded as usual. The infinite square of a negative z becomes NaN.

Floor for T tokens, D, H: 2·T·D·H FLOPs each. up moves x, w_up and hidden; gradient moves grad, w_down, hidden and dz.
At 98,304 x 512 x 2048 in bfloat16: 206 GFLOP, 0.21 ms at 989 TFLOP/s, and 0.51 and 0.91 GB, 0.11 and 0.19 ms at
4.8 TB/s.

Both are persistent: one program a multiprocessor walks over tiles, the columns of H fastest, so that the rows of x stay
in the L2 cache; the loads of the next tile run under the epilogue of this one. A tile leaves in two halves, which
halves the shared memory of the epilogue and buys a stage for the loads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.triton_kernels.variants import Variant, architecture, programs


@dataclass(frozen=True)
class Launch:
    block_m: int  # tokens
    block_n: int  # hidden units
    block_k: int
    num_warps: int
    up_stages: int
    gradient_stages: int  # the tile of hidden takes a stage's memory
    resident: int = 1  # programs of a multiprocessor: with two, one's epilogue runs under the other's products


# By architecture and bytes an element. float32 is computed without the tensor cores, in small tiles.
LAUNCHES = {
    (90, 2): Launch(128, 256, 64, 8, up_stages=4, gradient_stages=3),
    (90, 4): Launch(64, 64, 32, 8, up_stages=3, gradient_stages=3),
}
SAFE_LAUNCH = Launch(64, 64, 32, 8, up_stages=2, gradient_stages=2)


@triton.jit
def with_sign(square, negative, DTYPE: tl.constexpr):
    """float32 squares >= 0 as numbers of DTYPE whose last bit is `negative`."""
    if DTYPE.is_fp16():  # its small numbers are not float32 numbers cut short
        rounded = square.to(tl.float16)
        bits = rounded.to(tl.int16, bitcast=True)
        wide = rounded.to(tl.float32)
        step = tl.where((square >= wide) | (wide == float("inf")), 1, -1).to(tl.int16)
        result = tl.where((bits & 1) == negative.to(tl.int16), bits, bits + step).to(tl.float16, bitcast=True)
    else:
        ONE: tl.constexpr = 65536 if DTYPE.is_bf16() else 1  # the last bit of DTYPE in a float32
        bits = square.to(tl.int32, bitcast=True)
        bits = tl.where(negative, bits, bits + ONE) & (-2 * ONE)
        result = tl.where(negative, bits | ONE, bits).to(tl.float32, bitcast=True).to(DTYPE)
    return result


@triton.jit
def derivative(hidden, slope, RELU: tl.constexpr):
    """d(a²)/dz in float32."""
    root = tl.sqrt(hidden.to(tl.float32))
    if RELU:
        result = 2 * root
    else:
        if hidden.dtype.is_fp16():
            negative = (hidden.to(tl.int16, bitcast=True) & 1) != 0
        else:
            ONE: tl.constexpr = 65536 if hidden.dtype.is_bf16() else 1
            negative = (hidden.to(tl.float32).to(tl.int32, bitcast=True) & ONE) != 0
        result = root * tl.where(negative, -2 * slope, 2.0)
    return result


@triton.jit
def activation(z, slope, RELU: tl.constexpr, DTYPE: tl.constexpr):
    if RELU:
        hidden = tl.where(z <= 0, 0.0, z * z).to(DTYPE)  # NaN stays NaN
    else:
        a = tl.where(z >= 0, z, slope * z)
        hidden = with_sign(a * a, (z >= 0) == 0, DTYPE)  # NaN counts as negative: that keeps it NaN
    return hidden


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a tile (M, N)."""
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def leaky_relu2_up_kernel(
    x_desc,  # (T, D)
    w_up_desc,  # (H, D)
    hidden_desc,  # (T, H)
    tokens,
    hidden_size,
    size,
    slope,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(hidden_size, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m = tile // columns * BLOCK_M
        n = tile % columns * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, size, BLOCK_K):
            z = tl.dot(x_desc.load([m, k]), w_up_desc.load([n, k]).T, z, input_precision=PRECISION)
        left, right = halves(z, BLOCK_M, BLOCK_N)
        hidden_desc.store([m, n], activation(left, slope, RELU, hidden_desc.dtype))
        hidden_desc.store([m, n + BLOCK_N // 2], activation(right, slope, RELU, hidden_desc.dtype))


@triton.jit
def leaky_relu2_gradient_kernel(
    grad_desc,  # (T, D)
    w_down_desc,  # (D, H)
    hidden_desc,  # (T, H)
    dz_desc,  # (T, H)
    tokens,
    hidden_size,
    size,
    slope,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(hidden_size, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m = tile // columns * BLOCK_M
        n = tile % columns * BLOCK_N
        dpost = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, size, BLOCK_K):
            dpost = tl.dot(grad_desc.load([m, k]), w_down_desc.load([k, n]), dpost, input_precision=PRECISION)
        left, right = halves(dpost, BLOCK_M, BLOCK_N)
        left *= derivative(hidden_desc.load([m, n]), slope, RELU)
        dz_desc.store([m, n], left.to(dz_desc.dtype))
        right *= derivative(hidden_desc.load([m, n + BLOCK_N // 2]), slope, RELU)
        dz_desc.store([m, n + BLOCK_N // 2], right.to(dz_desc.dtype))


def launch_up(x: Tensor, w_up: Tensor, slope: float) -> Tensor:
    """hidden (T, H) of x (T, D) and w_up (H, D): one dtype of float16, bfloat16, float32; no size is 0."""
    tokens, size = x.shape
    config = _config(x)
    hidden = _rows(x, tokens, w_up.shape[0])
    half = config.block_n // 2
    with torch.cuda.device_of(x):
        leaky_relu2_up_kernel[_grid(config, hidden)](
            _descriptor(x, config.block_m, config.block_k),
            _descriptor(w_up, config.block_n, config.block_k),
            _descriptor(hidden, config.block_m, half),
            tokens,
            w_up.shape[0],
            size,
            slope,
            num_stages=config.up_stages,
            **_constants(config, x.dtype, slope),
        )
    return hidden.contiguous()


def launch_gradient(grad: Tensor, w_down: Tensor, hidden: Tensor, slope: float) -> Tensor:
    """dz (T, H) of grad (T, D), w_down (D, H) and hidden (T, H): one dtype as in `launch_up`; no size is 0."""
    tokens, size = grad.shape
    config = _config(grad)
    dz = _rows(grad, tokens, w_down.shape[1])
    half = config.block_n // 2
    with torch.cuda.device_of(grad):
        leaky_relu2_gradient_kernel[_grid(config, dz)](
            _descriptor(grad, config.block_m, config.block_k),
            _descriptor(w_down, config.block_k, config.block_n),
            _descriptor(hidden, config.block_m, half),
            _descriptor(dz, config.block_m, half),
            tokens,
            w_down.shape[1],
            size,
            slope,
            num_stages=config.gradient_stages,
            **_constants(config, grad.dtype, slope),
        )
    return dz.contiguous()


def _config(tensor: Tensor) -> Launch:
    return LAUNCHES.get((architecture(tensor.device), tensor.element_size()), SAFE_LAUNCH)


def _grid(config: Launch, out: Tensor) -> tuple[int]:
    tiles = triton.cdiv(out.shape[0], config.block_m) * triton.cdiv(out.shape[1], config.block_n)
    return (programs(out.device, tiles, config.resident),)


def _constants(config: Launch, dtype: torch.dtype, slope: float) -> dict:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "RELU": slope == 0,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """New memory (rows, columns) whose rows begin at multiples of 16 bytes, as the copy engine asks."""
    step = 16 // like.element_size()
    return like.new_empty(rows, triton.cdiv(columns, step) * step)[:, :columns]


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Of a copy where the copy engine cannot read the tensor itself. What lies outside of a shape is read as 0."""
    rows, columns = tensor.shape
    size = tensor.element_size()
    if tensor.stride(1) != 1 or tensor.stride(0) * size % 16 or tensor.stride(0) < columns or tensor.data_ptr() % 16:
        tensor = _rows(tensor, rows, columns).copy_(tensor)
    return TensorDescriptor(tensor, [rows, columns], [tensor.stride(0), 1], [block_rows, block_columns])


def _variant(name: str, tokens: int, size: int, hidden_size: int, slope: float, dtype=torch.bfloat16) -> Variant:
    config = LAUNCHES[90, dtype.itemsize]
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    up = name == "up"
    m, n, k, half = config.block_m, config.block_n, config.block_k, config.block_n // 2
    blocks = (
        {"x_desc": (m, k), "w_up_desc": (n, k), "hidden_desc": (m, half)}
        if up
        else {"grad_desc": (m, k), "w_down_desc": (k, n), "hidden_desc": (m, half), "dz_desc": (m, half)}
    )
    constants = _constants(config, dtype, slope)
    constexprs = {key: value for key, value in constants.items() if key.isupper()}
    activations, hidden = tokens * size, tokens * hidden_size
    elements = activations + size * hidden_size + hidden * (1 if up else 2)
    return Variant(
        name=f"leaky_relu2_mlp {name}{'' if slope else ' slope 0'} {kind} {tokens}x{size}x{hidden_size}",
        kernel=leaky_relu2_up_kernel if up else leaky_relu2_gradient_kernel,
        signature={
            **{name: f"tensordesc<{kind}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()},
            **dict.fromkeys(("tokens", "hidden_size", "size"), "i32"),
            "slope": "fp32",
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.up_stages if up else config.gradient_stages,
        programs=132 * config.resident,
        bytes_moved=dtype.itemsize * elements,
        flops=2 * tokens * size * hidden_size,
        aligned=("tokens", "hidden_size", "size"),
    )


VARIANTS = [
    _variant("up", 98_304, 512, 2048, 0.5),
    _variant("gradient", 98_304, 512, 2048, 0.5),
    _variant("up", 98_304, 512, 2048, 0.0),
    _variant("gradient", 98_304, 512, 2048, 0.0),
    _variant("up", 98_304, 512, 2048, 0.5, torch.float16),
    _variant("gradient", 98_304, 512, 2048, 0.5, torch.float16),
    _variant("up", 98_304, 512, 2048, 0.5, torch.float32),
    _variant("gradient", 98_304, 512, 2048, 0.5, torch.float32),
]
