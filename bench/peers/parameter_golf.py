"""The challenge's baseline script, and the kernels of the record of PR #1855.

From `train_gpt.py`: its Newton-Schulz iteration, one matrix at a time in bfloat16. From `RECORD`: the feed-forward
block of PR #1530 (one Triton kernel for the up-projection and for the gradient; pre- and post-activation are both
stored) and the soft-capped cross-entropy of PR #1787. Both need CUDA; the former is bfloat16 with slope 0.5 only. And
its GPTQ, which is for a CPU, one matrix at a time.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.peers import take

REPOSITORY = "openai/parameter-golf"
RECORD = "records/track_10min_16mb/2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611/train_gpt.py"


def load(checkout: Path) -> SimpleNamespace:
    names = ["zeropower_via_newtonschulz5"]  # (matrix (M, N), steps) -> (M, N) bfloat16
    return take(checkout / "train_gpt.py", names, {"torch": torch, "Tensor": torch.Tensor})


def leaky_relu2_mlp(checkout: Path) -> Callable:
    """(x (T, D), w_up (H, D), w_down (D, H)) -> (T, D), slope 0.5."""
    names = ["linear_leaky_relu_square_kernel", "linear_leaky_relu_square", "FusedLinearLeakyReLUSquareFunction"]
    return take(checkout / RECORD, names, _given()).FusedLinearLeakyReLUSquareFunction.apply


def softcapped_cross_entropy(checkout: Path) -> Callable:
    """(logits (T, V), targets (T,), softcap) -> mean."""
    constants = ["_FUSED_CE_LIBRARY", "_FUSED_CE_BLOCK_SIZE", "_FUSED_CE_NUM_WARPS"]
    kernels = ["_softcapped_ce_fwd_kernel", "_softcapped_ce_bwd_kernel", "_validate_softcapped_ce_inputs"]
    operations = ["softcapped_ce_op", "softcapped_ce_backward_op"]
    autograd = ["_softcapped_ce_setup_context", "_softcapped_ce_backward", "softcapped_cross_entropy"]
    taken = take(checkout / RECORD, [*constants, *kernels, *operations, *autograd], _given())
    return taken.softcapped_cross_entropy


def gptq(checkout: Path) -> Callable:
    """(weight (M, N) or (B, M, N), hessian) -> values and scale at 6 bits, clipped where ours is by default."""
    function = take(checkout / RECORD, ["gptq_quantize_weight"], {"torch": torch}).gptq_quantize_weight

    def call(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.ndim == 2:
            return function(weight, hessian, clip_sigmas=12.85, clip_range=31)
        values, scales = zip(*map(call, weight, hessian), strict=True)
        return torch.stack(values), torch.stack(scales)

    return call


def _given() -> dict:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    return {
        "torch": torch,
        "F": F,
        "Tensor": torch.Tensor,
        "triton": triton,
        "tl": tl,
        "TensorDescriptor": TensorDescriptor,
    }
