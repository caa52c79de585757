"""The forward pass. Training, calibration, scoring and test-time training all call this one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf import ops
from pgolf.attention import attention
from pgolf.model.attention_gate import gate_heads
from pgolf.model.bigram_hash import bigram_buckets, bigram_embedding
from pgolf.model.config import ModelConfig
from pgolf.model.documents import Documents, packed_documents, rows_as_documents
from pgolf.model.initialise import initialise
from pgolf.model.norm import norm
from pgolf.model.residual import merge_lanes, mix_with_embedding, route_to_lanes
from pgolf.model.rotary import rotary_tables, rotate, score_scale
from pgolf.model.skips import add_skip
from pgolf.model.smear_gate import smear
from pgolf.model.softcap import asymmetric_softcap, softcap
from pgolf.model.value_embedding import value_embedding
from pgolf.model.xsa import exclude_self

# Called with (bank name, index in the bank, input) for every matrix product: how calibration sees the inputs.
Observer = Callable[[str, int, Tensor], None]
BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")


class Layer(NamedTuple):
    """One layer's parameters in the compute dtype."""

    number: int
    q: Tensor  # (dim, dim)
    k: Tensor  # (kv_dim, dim)
    v: Tensor  # (kv_dim, dim)
    out: Tensor  # (dim, dim)
    up: Tensor  # (hidden_dim, dim)
    down: Tensor  # (dim, hidden_dim)
    gain: Tensor  # (heads,)
    attn_scale: Tensor  # (dim,)
    mlp_scale: Tensor  # (dim,)
    mix: Tensor  # (2, dim)
    # Of techniques that may be off:
    gate: Tensor  # (heads, gate_window), attention's
    keep: Tensor  # (2,) and
    post: Tensor  # (2, 2), the two lanes'


class Batch(NamedTuple):
    """What every layer needs to know of the tokens."""

    documents: Documents
    rotary: tuple[Tensor, Tensor]
    values: dict[int, Tensor]  # layer -> what it adds to its values, (rows, length, kv_dim)


class Model(nn.Module):
    """Parameters are float32; the forward pass computes in `dtype`. Shapes are in `ModelConfig.shapes`."""

    embedding: nn.Parameter
    softcaps: nn.Parameter

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.attention = "auto"  # a backend of pgolf.attention
        self.looping = config.num_loops > 0  # depth recurrence; a trainer may switch it on late
        self.visits = {looping: config.visits(looping) for looping in (False, True)}
        self.caps_differ = False  # see softcap.py
        self.fake_quantize: Callable[[str, Tensor], Tensor] | None = None  # of (name, bank), once a forward pass
        for name, shape in config.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def initialise(self, generator: torch.Generator) -> "Model":
        initialise(dict(self.named_parameters()), self.config, generator)
        return self

    def forward(
        self,
        tokens: Tensor,  # (rows, length) integer
        cu_seqlens: Tensor | None = None,  # (count + 1,) int32: documents.py; without it each row is a document
        max_seqlen: int = 0,  # bound of the documents' lengths; 0 if nothing better than rows · length is known
        *,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits before the soft-cap, (rows, length, vocab_size) in the compute dtype."""
        shape = tokens.shape
        if cu_seqlens is None:
            documents = rows_as_documents(tokens)
        else:
            tokens = tokens.reshape(1, -1)
            documents = packed_documents(tokens, cu_seqlens, max_seqlen)
        embedding = self.embedding.to(self.dtype)
        x = self._layers(self._embed(tokens, embedding, documents), self._batch(tokens, documents), observe)
        if observe:
            observe("embedding", 0, x)
        return F.linear(x, embedding).view(*shape, -1)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
    ) -> Tensor:
        """Cross-entropy in nats a token of targets (rows, length), in float32."""
        return self.loss_of(self(tokens, cu_seqlens, max_seqlen), targets, reduction)

    def loss_of(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The same from what `forward` returned."""
        if not self.caps_differ:
            return ops.softcapped_cross_entropy(logits, targets, self.config.logit_softcap, reduction)
        loss = F.cross_entropy(self.capped(logits).flatten(0, -2), targets.long().flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the soft-cap, in float32: what probabilities are made of."""
        if self.caps_differ:
            return asymmetric_softcap(logits.float(), self.softcaps)
        return softcap(logits.float(), self.config.logit_softcap)

    def _embed(self, tokens: Tensor, embedding: Tensor, documents: Documents) -> Tensor:
        """The first layer's input, (rows, length, dim)."""
        config = self.config
        x = F.embedding(tokens, embedding)
        if config.bigram_vocab_size:
            buckets = bigram_buckets(tokens, documents.starts, config.bigram_vocab_size)
            names = ("bigram_embedding", "bigram_projection", "bigram_scale")
            x = x + bigram_embedding(buckets, *map(self._cast, names))
        if config.smear_gate_enabled:
            starts = documents.starts
            if config.smear_gate_bos_fix:
                starts = starts | (tokens == config.bos_id)
            x = smear(x, self._cast("smear_gate"), self._cast("smear_lambda"), starts)
        return norm(x)

    def _batch(self, tokens: Tensor, documents: Documents) -> Batch:
        config = self.config
        rotary = rotary_tables(
            documents.positions,
            config.rotary_dims,
            config.rope_base,
            self.dtype,
            config.rope_scaling,
            self._stretch(documents),
            config.rope_train_seq_len,
        )
        values: dict[int, Tensor] = {}
        if config.value_embedding_layers:
            shared = value_embedding(tokens, *map(self._cast, ("value_embedding", "value_projection", "value_scale")))
            scales = self._cast("value_layer_scales").unbind(0)
            values = {layer: shared * scale for layer, scale in zip(config.value_embedding_layers, scales, strict=True)}
        return Batch(documents, rotary, values)

    def _stretch(self, documents: Documents) -> float:
        return max(1.0, documents.longest / self.config.rope_train_seq_len)

    def _layers(self, x: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        """From the normalised embedding to the normalised hidden state, (rows, length, dim) both."""
        config, layers = self.config, self._weights()
        weights, gates = self._rows("skip_weights", config.num_skips), self._rows("skip_gates", config.num_skips)
        x0 = x
        lane: Tensor | None = None  # the second one, that the MLPs read
        stored: list[Tensor] = []
        for visit in self.visits[self.looping]:
            layer = layers[visit.layer]
            if lane is None and config.two_lanes(visit):
                lane = x
            if visit.skip is not None:
                x = add_skip(x, stored.pop(), weights[visit.skip], gates[visit.skip])
            if lane is not None:
                x, lane = self._two_lane_layer(layer, x, lane, x0, batch, observe)
            elif config.parallel(visit.layer):
                x = self._parallel_layer(layer, x, x0, batch, observe)
            else:
                x = self._layer(layer, x, x0, batch, observe)
            if visit.stores:
                stored.append(x)
        if lane is not None:
            x = merge_lanes((x, lane), config.parallel_final_lane)
        return norm(x)

    def _layer(self, layer: Layer, x: Tensor, x0: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        scale = self.config.norm_scale(layer.number)
        x = mix_with_embedding(x, x0, layer.mix)
        x = x + layer.attn_scale * self._attend(layer, norm(x, scale), batch, observe)
        return x + layer.mlp_scale * self._mlp(layer, norm(x, scale), observe)

    def _parallel_layer(self, layer: Layer, x: Tensor, x0: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        """GPT-J form, PRs #1204 and #1412: one norm, and both branches read it."""
        x = mix_with_embedding(x, x0, layer.mix)
        h = norm(x, self.config.norm_scale(layer.number))
        x = x + layer.attn_scale * self._attend(layer, h, batch, observe)
        return x + layer.mlp_scale * self._mlp(layer, h, observe)

    def _two_lane_layer(
        self, layer: Layer, x: Tensor, lane: Tensor, x0: Tensor, batch: Batch, observe: Observer | None
    ) -> tuple[Tensor, Tensor]:
        scale = self.config.norm_scale(layer.number)
        h = norm(mix_with_embedding(x, x0, layer.mix), scale)
        attended = layer.attn_scale * self._attend(layer, h, batch, observe)
        mlp = layer.mlp_scale * self._mlp(layer, norm(lane, scale), observe)
        return route_to_lanes((x, lane), attended, mlp, layer.keep, layer.post)

    def _attend(self, layer: Layer, h: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        """Attention of the normalised input h (rows, length, dim), with its output projection."""
        config, documents = self.config, batch.documents
        if observe:
            observe("qo_bank", layer.number, h)
            observe("kv_bank", layer.number, h)
            observe("kv_bank", config.num_layers + layer.number, h)
        query = F.linear(h, layer.q)
        q = query.unflatten(-1, (config.num_heads, -1))
        k = F.linear(h, layer.k).unflatten(-1, (config.num_kv_heads, -1))
        v = F.linear(h, layer.v)
        if layer.number in batch.values:
            v = v + batch.values[layer.number]
        v = v.unflatten(-1, (config.num_kv_heads, -1))
        gain = layer.gain.unsqueeze(-1)
        if (sharpen := score_scale(config.rope_scaling, self._stretch(documents))) != 1.0:
            gain = gain * sharpen
        q, k = rotate(norm(q), batch.rotary) * gain, rotate(norm(k), batch.rotary)
        y = attention(q, k, v, documents.cu_seqlens, documents.longest, self.attention)
        if config.excludes_self(layer.number):
            y = exclude_self(y, v)
        if config.attn_out_gate_enabled:
            y = gate_heads(y, query if config.attn_out_gate_src == "q" else h, layer.gate, gain=2.0)
        if config.sparse_attn_gate_enabled:
            y = gate_heads(y, h, layer.gate, scale=config.sparse_attn_gate_scale)
        y = y.flatten(-2)
        if observe:
            observe("qo_bank", config.num_layers + layer.number, y)
        return F.linear(y, layer.out)

    def _mlp(self, layer: Layer, h: Tensor, observe: Observer | None) -> Tensor:
        slope = self.config.mlp_slope
        if observe:
            observe("up_bank", layer.number, h)
            observe("down_bank", layer.number, F.leaky_relu(F.linear(h, layer.up), slope).square())
        return ops.leaky_relu2_mlp(h, layer.up, layer.down, slope)

    def _weights(self) -> list[Layer]:
        """One cast and one unbind a bank: the gradient of a bank is then stacked once, not padded layer by layer."""
        layers = self.config.num_layers
        qo, kv, up, down = (self._bank(name).unbind(0) for name in BANKS)
        names = ("q_gain", "attn_scale", "mlp_scale", "resid_mix")
        optional = ("attn_gate", "parallel_resid_lambdas", "parallel_post_lambdas")
        small = [self._rows(name, layers) for name in names + optional]
        return [
            Layer(i, qo[i], kv[i], kv[layers + i], qo[layers + i], up[i], down[i], *(rows[i] for rows in small))
            for i in range(layers)
        ]

    def _bank(self, name: str) -> Tensor:
        bank = getattr(self, name)
        if self.fake_quantize is not None:
            bank = self.fake_quantize(name, bank)
        return bank.to(self.dtype)

    def _cast(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""
        return getattr(self, name).to(self.dtype)

    def _rows(self, name: str, count: int) -> Sequence[Any]:
        """A parameter's rows in the compute dtype, or nothing that often where the technique is off."""
        return self._cast(name).unbind(0) if name in self._parameters else (None,) * count
