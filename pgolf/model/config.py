"""What is needed to build a model, and nothing else: it travels in the artifact."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from pgolf.model.recurrence import Visit, visits
from pgolf.settings import Settings

ROLES = {
    "embedding": "embedding",
    "bigram_embedding": "embedding",
    "value_embedding": "embedding",
    "qo_bank": "attention",
    "kv_bank": "attention",
    "up_bank": "mlp",
    "down_bank": "mlp",
}
# Tables that are no factor of a matrix product: nothing is known of the inputs of their columns.
LOOKED_UP = ("bigram_embedding", "value_embedding")


def role_of(name: str) -> str:
    """The role under which a parameter's bytes are counted: embedding, attention, mlp or control."""
    return ROLES.get(name, "control")


@dataclass(frozen=True)
class ModelConfig:
    """Each field is the setting of the same name."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_mult: float
    mlp_slope: float
    rope_base: float
    rope_dims: int
    rope_scaling: str
    rope_train_seq_len: int
    qk_gain_init: float
    xsa_last_n: int
    attn_out_gate_enabled: bool
    attn_out_gate_src: str
    sparse_attn_gate_enabled: bool
    sparse_attn_gate_scale: float
    gate_window: int
    ln_scale: bool
    unet_skips: bool
    skip_gates_enabled: bool
    num_loops: int
    loop_start: int
    loop_end: int
    parallel_residual_start: int
    parallel_start_layer: int
    parallel_final_lane: str
    smear_gate_enabled: bool
    smear_gate_bos_fix: bool
    bos_id: int
    bigram_vocab_size: int
    bigram_dim: int
    ve_layers: str
    ve_dim: int
    logit_softcap: float
    asym_logit_rescale: bool
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
    def rotary_dims(self) -> int:
        return self.rope_dims or self.head_dim

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        return tuple(int(layer) for layer in self.ve_layers.split(",") if layer.strip())

    @property
    def num_skips(self) -> int:
        """Outputs of the first half that return in the second, with all loops run."""
        if not self.unet_skips:
            return 0
        loops = self.num_loops * (self.loop_end - self.loop_start + 1)
        return (self.num_layers + loops) // 2  # a sum, for a file may say that there are billions

    @property
    def gates(self) -> int:
        """How many gates attention's output has in a layer: one a head, or none."""
        return self.num_heads if self.attn_out_gate_enabled or self.sparse_attn_gate_enabled else 0

    @property
    def gates_by_query(self) -> bool:
        """Whether that gate reads the query, not the layer's input."""
        return self.attn_out_gate_enabled and self.attn_out_gate_src == "q"

    def visits(self, looping: bool) -> tuple[Visit, ...]:
        """The layers in the order in which they run."""
        loops = self.num_loops if looping else 0
        return visits(self.num_layers, loops, self.loop_start, self.loop_end, self.unet_skips)

    def norm_scale(self, layer: int) -> float:
        """With LN_SCALE (PR #315) deep layers read a smaller input, so that their weights' gradients and outputs do not
        outgrow those of the first."""
        return 1.0 / math.sqrt(layer + 1) if self.ln_scale else 1.0

    def excludes_self(self, layer: int) -> bool:
        return layer >= self.num_layers - self.xsa_last_n

    def parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same input and add to it together (GPT-J form)."""
        return 0 <= self.parallel_residual_start <= layer

    def two_lanes(self, visit: Visit) -> bool:
        return visit.second_half and 0 < self.parallel_start_layer <= visit.layer

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        layers, dim, kv_dim = self.num_layers, self.model_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (self.vocab_size, dim),
            "qo_bank": (2 * layers, dim, dim),  # the layers' q, then their output projections
            "kv_bank": (2 * layers, kv_dim, dim),  # the layers' k, then their v
            "up_bank": (layers, self.hidden_dim, dim),
            "down_bank": (layers, dim, self.hidden_dim),
            "q_gain": (layers, self.num_heads),
            "attn_scale": (layers, dim),
            "mlp_scale": (layers, dim),
            "resid_mix": (layers, 2, dim),
        }
        if self.num_skips:
            shapes["skip_weights"] = (self.num_skips, dim)
            if self.skip_gates_enabled:
                shapes["skip_gates"] = (self.num_skips, dim)
        if self.gates:
            shapes["attn_gate"] = (layers, self.num_heads, self.gate_window)
        if self.parallel_start_layer:  # all layers have them, as in the entries, though few use them
            shapes["parallel_resid_lambdas"] = (layers, 2)
            shapes["parallel_post_lambdas"] = (layers, 2, 2)
        if self.smear_gate_enabled:
            shapes["smear_gate"] = (1, self.gate_window)
            shapes["smear_lambda"] = (1,)
        if self.bigram_vocab_size:
            shapes["bigram_embedding"] = (self.bigram_vocab_size, self.bigram_dim)
            shapes["bigram_projection"] = (dim, self.bigram_dim)
            shapes["bigram_scale"] = (1,)
        if self.value_embedding_layers:
            shapes["value_embedding"] = (self.vocab_size, self.ve_dim)
            shapes["value_projection"] = (kv_dim, self.ve_dim)
            shapes["value_scale"] = (1,)
            shapes["value_layer_scales"] = (len(self.value_embedding_layers),)
        if self.asym_logit_rescale:
            shapes["softcaps"] = (2,)  # of positive and of negative logits
        return shapes

    def weights_met(self, looping: bool) -> int:
        """Weights of matrices that a token is multiplied with on its way, those of looped layers each time."""
        dim, kv_dim = self.model_dim, self.num_kv_heads * self.head_dim
        layer = 2 * dim * dim + 2 * kv_dim * dim + 2 * self.hidden_dim * dim
        if self.attn_out_gate_enabled or self.sparse_attn_gate_enabled:
            layer += self.num_heads * self.gate_window
        once = self.vocab_size * dim
        once += dim * self.bigram_dim if self.bigram_vocab_size else 0
        once += kv_dim * self.ve_dim if self.value_embedding_layers else 0
        once += self.gate_window if self.smear_gate_enabled else 0
        return once + layer * len(self.visits(looping))

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())
