"""Operations: one file each, with a definition in plain PyTorch that every kernel is tested against.

`available()` tells what runs on this machine, `backend(name)` or `PGOLF_BACKEND` forces an implementation.
"""

from pgolf.ops.accumulate_hessian import accumulate_hessian
from pgolf.ops.backends import BACKENDS, Availability, BackendUnavailable, available, backend, fallbacks, used
from pgolf.ops.embedding_smear_norm import embedding_smear_norm
from pgolf.ops.gptq import gptq
from pgolf.ops.gptq_refine import gptq_refine
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp
from pgolf.ops.linear_softcapped_cross_entropy import linear_softcapped_cross_entropy
from pgolf.ops.newton_schulz import newton_schulz
from pgolf.ops.pack_bits import pack_bits, unpack_bits
from pgolf.ops.qk_norm_rope import qk_norm_rope
from pgolf.ops.qkv_norm_rope import qkv_norm_rope
from pgolf.ops.residual_rms_norm import residual_rms_norm, residual_sum_rms_norm
from pgolf.ops.softcapped_cross_entropy import softcapped_cross_entropy
from pgolf.ops.trellis_dequantize import trellis_dequantize
from pgolf.ops.trellis_quantize import Trellis, trellis_quantize
from pgolf.ops.two_lane_rms_norm import two_lane_rms_norm
from pgolf.ops.unpack_dequantize import unpack_dequantize
from pgolf.ops.xsa_gate import xsa_gate

__all__ = [
    "BACKENDS",
    "Availability",
    "BackendUnavailable",
    "Trellis",
    "accumulate_hessian",
    "available",
    "backend",
    "embedding_smear_norm",
    "fallbacks",
    "gptq",
    "gptq_refine",
    "leaky_relu2_mlp",
    "linear_softcapped_cross_entropy",
    "newton_schulz",
    "pack_bits",
    "qk_norm_rope",
    "qkv_norm_rope",
    "residual_rms_norm",
    "residual_sum_rms_norm",
    "softcapped_cross_entropy",
    "trellis_dequantize",
    "trellis_quantize",
    "two_lane_rms_norm",
    "unpack_bits",
    "unpack_dequantize",
    "used",
    "xsa_gate",
]
