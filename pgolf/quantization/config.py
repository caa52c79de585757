"""How a run quantizes: the quantizer, and bits and clip of every tensor. What quantization knows of the settings.

The step of a row is clip_sigmas standard deviations of it over 2^(bits-1) - 1: few bits or a large clip make few bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pgolf.model import role_of
from pgolf.quantization.quantizers import QUANTIZERS, Quantized
from pgolf.settings import Settings


@dataclass(frozen=True)
class QuantizationConfig:
    quantizer: str  # of QUANTIZERS
    bits: Mapping[str, int]  # of each role whose matrices are quantized; 16: float16
    clip_sigmas: Mapping[str, float]  # of each of these roles
    damping: float  # added to the Hessian's diagonal, as a share of its mean
    coder: str  # of the artifact: MODES of pgolf/artifact/coder.py
    lqer_rank: int  # of the low-rank corrections; 0: none
    lqer_top_k: int  # so many matrices are corrected
    lqer_factor_bits: int

    @classmethod
    def of(cls, settings: Settings) -> "QuantizationConfig":
        s = settings
        bits = {"embedding": s.embed_bits, "attention": s.attn_bits, "mlp": s.mlp_bits}
        clips = {"embedding": s.embed_clip_sigmas, "attention": s.attn_clip_sigmas, "mlp": s.mlp_clip_sigmas}
        return cls(
            quantizer=s.quantizer,
            bits={role: own or s.matrix_bits for role, own in bits.items()},
            clip_sigmas={role: own or s.matrix_clip_sigmas for role, own in clips.items()},
            damping=s.gptq_damping,
            coder=s.artifact_coder,
            lqer_rank=s.lqer_rank,
            lqer_top_k=s.lqer_top_k,
            lqer_factor_bits=s.lqer_factor_bits,
        )

    def bits_of(self, name: str) -> int:
        """Bits a weight of the parameter `name`; 16 where it is stored as float16."""
        return self.bits.get(role_of(name), 16)

    def clip_of(self, name: str) -> float:
        return self.clip_sigmas[role_of(name)]

    def quantize(
        self,
        name: str,
        weight: Tensor,  # (rows, columns) or (count, rows, columns) float32
        hessians: Mapping[str, Tensor],  # (count, columns, columns) float32 by name
        clip_sigmas: float,
    ) -> Quantized:
        hessian = hessians[name] if weight.ndim == 3 else hessians[name][0]
        return QUANTIZERS[self.quantizer](weight, hessian, self.bits_of(name), clip_sigmas, self.damping)
