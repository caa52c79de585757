"""modded-nanogpt's kernels: the feed-forward block with relu², in bfloat16 on CUDA.

The down-projection's weight is stored as (H, D) there, the transpose of ours. Its float8 variants are left out.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from bench.peers import take

REPOSITORY = "KellerJordan/modded-nanogpt"
KERNELS = "triton_kernels.py"


def relu2_mlp(checkout: Path) -> Callable:
    """(x (T, D), w_up (H, D), w_down transposed (H, D)) -> (T, D)."""
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    given = {"torch": torch, "triton": triton, "tl": tl, "TensorDescriptor": TensorDescriptor}
    kernel = ["linear_relu_square_kernel", "linear_relu_square", "_dummy_f32", "_get_dummy_f32"]
    taken = take(checkout / KERNELS, [*kernel, "FusedLinearReLUSquareFunction"], given)
    return taken.FusedLinearReLUSquareFunction.apply


def softcapped_cross_entropy(checkout: Path) -> Callable:
    """Not comparable: always raises, with the vocabulary that the checkout's kernel is built for."""
    classes = take(checkout / KERNELS, ["CE_KERNEL_VOCAB_SIZE"], {}).CE_KERNEL_VOCAB_SIZE
    raise LookupError(
        f"its cross-entropy is compiled for {classes} classes, a constant of its source, "
        "multiplies by the head in float8 itself, and gives the gradient in float8 whatever gradient arrives"
    )
