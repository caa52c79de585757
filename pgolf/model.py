"""The model: a decoder-only transformer whose matrices live in banks, one 3-D parameter a role.

Architecture of the challenge's naive baseline (17,059,912 parameters at its preset): tied embeddings, RMSNorm without
weights, rotary embeddings, grouped-query attention with normalised q and k and a learned gain a head, LeakyReLU^2 MLP
(slope 0: ReLU^2), a learned mix of the residual stream with the embedding before each block, per-channel scales on both
branches, U-Net skips from the first half of the layers to the second, logits soft-capped.

There is one forward pass. Training, calibration and scoring all call it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf import ops
from pgolf.attention import attention
from pgolf.settings import Settings

# Called with (bank name, index in the bank, input) for every matrix product: how calibration sees the inputs.
Observer = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to build the model, and nothing else; it travels in the artifact."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_mult: float
    mlp_slope: float
    rope_base: float
    logit_softcap: float
    qk_gain_init: float
    tied_embed_init_std: float

    @classmethod
    def of(cls, settings: Settings) -> "ModelConfig":
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def num_skips(self) -> int:
        """Layers of the first half, whose outputs return in reverse order before the layers of the second."""
        return self.num_layers // 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        layers, dim, kv_dim = self.num_layers, self.model_dim, self.num_kv_heads * self.head_dim
        return {
            "embedding": (self.vocab_size, dim),
            "qo_bank": (2 * layers, dim, dim),  # the layers' q, then their output projections
            "kv_bank": (2 * layers, kv_dim, dim),  # the layers' k, then their v
            "up_bank": (layers, self.hidden_dim, dim),
            "down_bank": (layers, dim, self.hidden_dim),
            "q_gain": (layers, self.num_heads),
            "attn_scale": (layers, dim),
            "mlp_scale": (layers, dim),
            "resid_mix": (layers, 2, dim),
            "skip_weights": (self.num_skips, dim),
        }

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())


ROLES = {"embedding": "embedding", "qo_bank": "attention", "kv_bank": "attention", "up_bank": "mlp", "down_bank": "mlp"}


def role_of(name: str) -> str:
    """The role under which a parameter's bytes are counted: embedding, attention, mlp or control."""
    return ROLES.get(name, "control")


class Model(nn.Module):
    """Parameters are float32; the forward pass computes in `dtype`. Shapes are in `ModelConfig.shapes`."""

    embedding: nn.Parameter
    qo_bank: nn.Parameter
    kv_bank: nn.Parameter
    up_bank: nn.Parameter
    down_bank: nn.Parameter
    q_gain: nn.Parameter
    attn_scale: nn.Parameter
    mlp_scale: nn.Parameter
    resid_mix: nn.Parameter
    skip_weights: nn.Parameter

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        for name, shape in config.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "Model":
        """Fresh weights: orthogonal input matrices, zero output projections, the embedding small because it is tied."""
        config, layers = self.config, self.config.num_layers
        self.embedding.normal_(0.0, config.tied_embed_init_std, generator=generator)
        for bank in (self.qo_bank[:layers], self.kv_bank, self.up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix, generator=generator)
        self.qo_bank[layers:].zero_()
        self.down_bank.zero_()
        self.q_gain.fill_(config.qk_gain_init)
        self.resid_mix[:, 1].zero_()
        return self

    def forward(self, tokens: Tensor, observe: Observer | None = None) -> Tensor:
        """tokens (rows, length) int64 -> logits before the soft-cap (rows, length, vocab_size) in the compute dtype."""
        config, layers = self.config, self.config.num_layers
        rows, length = tokens.shape
        embedding = self.embedding.to(self.dtype)
        # One cast and one unbind a bank: the gradient of a bank is then stacked once, not padded layer by layer.
        qo, kv, up, down = (
            bank.to(self.dtype).unbind(0) for bank in (self.qo_bank, self.kv_bank, self.up_bank, self.down_bank)
        )
        gain, attn_scale, mlp_scale, mix, skip = (
            small.to(self.dtype)
            for small in (self.q_gain, self.attn_scale, self.mlp_scale, self.resid_mix, self.skip_weights)
        )
        rotary = self._rotary_tables(length, tokens.device)

        x = x0 = norm(F.embedding(tokens, embedding))  # (rows, length, dim)
        skips: list[Tensor] = []
        for layer in range(layers):
            if layer >= config.num_skips and skips:
                x = x + skip[layer - config.num_skips] * skips.pop()
            x = mix[layer, 0] * x + mix[layer, 1] * x0

            h = norm(x)
            if observe:
                observe("qo_bank", layer, h)
                observe("kv_bank", layer, h)
                observe("kv_bank", layers + layer, h)
            q = F.linear(h, qo[layer]).view(rows, length, config.num_heads, config.head_dim)
            k = F.linear(h, kv[layer]).view(rows, length, config.num_kv_heads, config.head_dim)
            v = F.linear(h, kv[layers + layer]).view(rows, length, config.num_kv_heads, config.head_dim)
            q = rotate(norm(q), rotary) * gain[layer].unsqueeze(-1)
            y = attention(q, rotate(norm(k), rotary), v).reshape(rows, length, config.model_dim)
            if observe:
                observe("qo_bank", layers + layer, y)
            x = x + attn_scale[layer] * F.linear(y, qo[layers + layer])

            h = norm(x)
            if observe:
                observe("up_bank", layer, h)
                observe("down_bank", layer, F.leaky_relu(F.linear(h, up[layer]), config.mlp_slope).square())
            x = x + mlp_scale[layer] * ops.leaky_relu2_mlp(h, up[layer], down[layer], config.mlp_slope)
            if layer < config.num_skips:
                skips.append(x)

        x = norm(x)
        if observe:
            observe("embedding", 0, x)
        return F.linear(x, embedding)

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats a token of targets (rows, length), in float32."""
        return self.loss_of(self(tokens), targets, reduction)

    def loss_of(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The same from what `forward` returned."""
        return ops.softcapped_cross_entropy(logits, targets, self.config.logit_softcap, reduction)

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (length, 1, head_dim / 2) each, in the compute dtype."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_base ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
        angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency).unsqueeze(1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no weight."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x (rows, length, heads, head_dim), halves paired."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
