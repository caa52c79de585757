"""Quantisation-aware training: the forward pass sees banks rounded to the grid that `QUANTIZER=rtn` and GPTQ store.

With limit = 2^(bits - 1) - 1 and a row's scale s by the rule of `ops.gptq`, w becomes s r(w / s), clipped to
±limit s:

- `ste`: r rounds to nearest, and the gradient passes as if it did not (straight-through estimator, Bengio 2013);
- `soft_round`: r(x) = floor(x) + 1/2 + tanh(a (x - floor(x) - 1/2)) / (2 tanh(a / 2)), differentiated as it is; nearly
  the identity at a = 1, nearly rounding at a = 16 (Agustsson and Theis 2020). Clipped weights get no gradient.

Scales are held fixed when gradients are taken. Whether a model quantises is `Model.fake_quantize` being None or not,
which the compiler guards: switching it takes another graph, which warm-up has made. The sharpness a is a tensor, so
that it changes without one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.model import role_of
from pgolf.ops.gptq import SMALLEST_SCALE, row_deviation

SOFTEST, SHARPEST = 1.0, 16.0


class FakeQuantize:
    """Called with (name, bank (B, M, N) float32), gives the bank as it would be stored and read back, float32."""

    def __init__(self, form: str, bits: int, clip_sigmas: Mapping[str, float], device: torch.device):
        self.limit = 2 ** (bits - 1) - 1
        self.soft = form == "soft_round"
        self.clip_sigmas = clip_sigmas  # of each role whose matrices are quantized
        self.sharpness = torch.full((), SOFTEST, device=device)

    def set_progress(self, fraction: float) -> None:
        """How far quantised training has come, 0 to 1. The host does not wait for the device."""
        self.sharpness.fill_(SOFTEST + fraction * (SHARPEST - SOFTEST))

    def __call__(self, name: str, bank: Tensor) -> Tensor:
        fixed = bank.detach()
        scale = row_scale(fixed, self.clip_sigmas[role_of(name)], self.limit).unsqueeze(-1)
        if self.soft:
            return soft_round(bank / scale, self.sharpness).clamp(-self.limit, self.limit) * scale
        return (fixed / scale).round().clamp(-self.limit, self.limit) * scale + (bank - fixed)


def row_scale(bank: Tensor, clip_sigmas: float, limit: int) -> Tensor:
    """(B, M) float32 of bank (B, M, N): what `ops.gptq.row_scale` stores as float16, without its look for rows that
    cannot be stored, for which the host would wait."""
    deviation = row_deviation(bank.flatten(0, 1)).view(bank.shape[:-1])
    scale = torch.where(deviation > 0, clip_sigmas * deviation, bank.abs().amax(dim=-1)) / limit
    return scale.half().clamp_min(SMALLEST_SCALE).float()


def soft_round(x: Tensor, sharpness: Tensor) -> Tensor:
    floor = x.detach().floor()
    return floor + 0.5 + 0.5 * torch.tanh(sharpness * (x - floor - 0.5)) / torch.tanh(0.5 * sharpness)
