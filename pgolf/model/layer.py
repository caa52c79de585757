"""A layer's two branches, attention and MLP, from a normalised input to what is added to the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pgolf import ops
from pgolf.model.attention import attention
from pgolf.model.attention_gate import gate_logits
from pgolf.model.config import ModelConfig
from pgolf.model.documents import Documents
from pgolf.model.execution import Execution
from pgolf.ops.leaky_relu2_mlp import activation
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference
from pgolf.ops.xsa_gate import gate_heads, xsa_gate_reference

# Called with (bank name, index in the bank, input) for every matrix product: how calibration sees the inputs.
Observer = Callable[[str, int, Tensor], None]


class Layer(NamedTuple):
    """One layer's parameters in the compute dtype."""

    number: int
    q: Tensor  # (dim, dim)
    k: Tensor  # (kv_dim, dim)
    v: Tensor  # (kv_dim, dim)
    out: Tensor  # (dim, dim), its rows times attn_scale
    up: Tensor  # (hidden_dim, dim)
    down: Tensor  # (dim, hidden_dim), its rows times mlp_scale
    gain: Tensor  # (heads,)
    mix: Tensor  # (2, dim)
    # Of techniques that may be off:
    gate: Tensor  # (heads, gate_window), attention's
    keep: Tensor  # (2,) and
    post: Tensor  # (2, 2), the two lanes'
    joined: Tensor  # (columns, dim): q, k, v and gate below one another, for one product


class Batch(NamedTuple):
    """What every layer needs to know of the tokens."""

    documents: Documents
    rotary: tuple[Tensor, Tensor]  # cos and sin, (length, dims / 2) each
    sharpening: float  # of attention in documents longer than those trained on
    values: dict[int, Tensor]  # layer -> what it adds to its values, (rows, length, kv_dim)


def attention_branch(
    config: ModelConfig,
    execution: Execution,
    layer: Layer,
    h: Tensor,  # (rows, length, dim), normalised
    batch: Batch,
    observe: Observer | None,
) -> Tensor:
    """Attention of h, with its output projection, (rows, length, dim)."""
    documents = batch.documents
    if observe:
        observe("qo_bank", layer.number, h)
        observe("kv_bank", layer.number, h)
        observe("kv_bank", config.num_layers + layer.number, h)
    gain = layer.gain
    if batch.sharpening != 1.0:
        gain = gain * batch.sharpening
    if layer.joined is not None:
        q, k, v, own, logits = _one_product(config, layer, h, batch, gain)
    else:
        query = F.linear(h, layer.q)
        k = F.linear(h, layer.k).unflatten(-1, (config.num_kv_heads, -1))
        v = F.linear(h, layer.v)
        if layer.number in batch.values:
            v = v + batch.values[layer.number]
        v = own = v.unflatten(-1, (config.num_kv_heads, -1))
        q = query.unflatten(-1, (config.num_heads, -1))
        norm_and_rotate = ops.qk_norm_rope if "qk_norm_rope" in execution.fused else qk_norm_rope_reference
        q, k = norm_and_rotate(q, k, *batch.rotary, gain)
        logits = gate_logits(query if config.gates_by_query else h, layer.gate) if config.gates else None
    y = attention(q, k, v, documents.cu_seqlens, documents.longest, execution.attention)
    y = _exclude_and_gate(config, layer, y, own, logits, "xsa_gate" in execution.fused).flatten(-2)
    if observe:
        observe("qo_bank", config.num_layers + layer.number, y)
    return F.linear(y, layer.out)


def mlp_branch(config: ModelConfig, layer: Layer, h: Tensor, observe: Observer | None) -> Tensor:
    """The MLP of h (rows, length, dim), of the same shape."""
    slope = config.mlp_slope
    if observe:
        observe("up_bank", layer.number, h)
        observe("down_bank", layer.number, activation(h, layer.up, slope).square())
    return ops.leaky_relu2_mlp(h, layer.up, layer.down, slope)


def _one_product(
    config: ModelConfig, layer: Layer, h: Tensor, batch: Batch, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q and k for attention, v for attention and for XSA, and the gate's logits, of one product."""
    added = batch.values.get(layer.number)
    readers = 2 if added is None and config.excludes_self(layer.number) else 1
    projected = F.linear(h, layer.joined)
    q, k, (v, *again), logits = ops.qkv_norm_rope(
        projected, *batch.rotary, gain, config.num_kv_heads, config.head_dim, readers, config.gates
    )
    if added is not None:
        v = v + added.view_as(v)
    return q, k, v, again[0] if again else v, logits if config.gates else None


def _exclude_and_gate(
    config: ModelConfig, layer: Layer, y: Tensor, v: Tensor, logits: Tensor | None, fused: bool
) -> Tensor:
    gain, scale = (2.0, 1.0) if config.attn_out_gate_enabled else (1.0, config.sparse_attn_gate_scale)
    if config.excludes_self(layer.number):
        return (ops.xsa_gate if fused else xsa_gate_reference)(y, v, logits, gain, scale)
    return y if logits is None else gate_heads(y, logits, gain, scale)
