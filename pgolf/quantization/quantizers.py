"""The quantisers that a run can choose by name: `QUANTIZER=rtn|gptq|gptq_cd|trellis`.

Each takes a matrix or bank with the second moments of its inputs and returns what the artifact stores. `clip_sigmas`
sets the step, and so the bytes: the same number gives the same bytes, within a per cent, with every quantiser.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf import ops
from pgolf.artifact.stored_tensor import dequantize
from pgolf.ops.gptq import row_scale

TRELLIS_CLIP = 0.512  # of GPTQ's clip_sigmas, for as many bytes: an index steps over two steps of the grid
TRELLIS_STATES = 8


@dataclass(frozen=True, eq=False)
class Quantized:
    """Members of `StoredTensor`."""

    values: Tensor
    scale: Tensor
    order: Tensor | None = None
    states: int = 0

    def dequantize(self) -> Tensor:
        """The weights in float32."""
        return dequantize(self.values, self.scale, self.order, self.states)


def rtn(weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float) -> Quantized:
    """Round to nearest, blind to the inputs."""
    limit = 2 ** (bits - 1) - 1
    scale = row_scale(weight.reshape(-1, *weight.shape[-2:]).float(), clip_sigmas, limit).reshape(weight.shape[:-1])
    values = (weight.float() / scale.float().unsqueeze(-1)).round().clamp(-limit, limit)
    return Quantized(values.to(torch.int8), scale)


def gptq(weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float) -> Quantized:
    return Quantized(*ops.gptq(weight, hessian, bits, clip_sigmas=clip_sigmas, damping=damping))


def gptq_cd(weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float) -> Quantized:
    """Coordinate descent after GPTQ, scales refitted."""
    values, scale = ops.gptq(weight, hessian, bits, clip_sigmas=clip_sigmas, damping=damping)
    return Quantized(*ops.gptq_refine(weight, hessian, values, scale, bits))


def trellis(weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damping: float) -> Quantized:
    clip_sigmas *= TRELLIS_CLIP
    found = ops.trellis_quantize(weight, hessian, clip_sigmas, bits, TRELLIS_STATES, damping=damping)
    return Quantized(found.indices, found.scale, found.order, found.states)


# What each calls, to quantise and to read the artifact.
OPERATIONS = {
    "rtn": ("unpack_dequantize",),
    "gptq": ("gptq", "unpack_dequantize"),
    "gptq_cd": ("gptq", "gptq_refine", "unpack_dequantize"),
    "trellis": ("trellis_quantize", "trellis_dequantize"),
}
# One for each name that `Settings.quantizer` accepts.
QUANTIZERS: dict[str, Callable[[Tensor, Tensor, int, float, float], Quantized]] = {
    "rtn": rtn,
    "gptq": gptq,
    "gptq_cd": gptq_cd,
    "trellis": trellis,
}
