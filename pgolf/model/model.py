"""The forward pass. Training, calibration, scoring and test-time training all call this one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf import ops
from pgolf.model.attention import attention
from pgolf.model.attention_gate import gate_logits, gate_rows
from pgolf.model.bigram_hash import bigram_buckets, bigram_embedding
from pgolf.model.config import ModelConfig
from pgolf.model.documents import Documents, packed_documents, rows_as_documents
from pgolf.model.initialise import initialise
from pgolf.model.norm import norm
from pgolf.model.rotary import rotary_tables, score_scale
from pgolf.model.stream import FusedLanes, FusedStream, Lanes, Stream
from pgolf.model.value_embedding import value_embedding
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference, smear
from pgolf.ops.leaky_relu2_mlp import activation
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference
from pgolf.ops.softcapped_cross_entropy import soft_cap, softcapped_cross_entropy_reference
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
    rotary: tuple[Tensor, Tensor]
    values: dict[int, Tensor]  # layer -> what it adds to its values, (rows, length, kv_dim)


class Model(nn.Module):
    """Parameters are float32; the forward pass computes in `dtype`. Shapes are in `ModelConfig.shapes`."""

    embedding: nn.Parameter
    attn_scale: nn.Parameter
    mlp_scale: nn.Parameter
    softcaps: nn.Parameter

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.attention = "auto"  # a backend of pgolf.model.attention
        self.fused: frozenset[str] = frozenset()  # operations between the products: glue.py
        self.looping = config.num_loops > 0  # depth recurrence; a trainer may switch it on late
        self.visits = {looping: config.visits(looping) for looping in (False, True)}
        self.caps_differ = False  # whether test-time training has moved the two softcaps, one for each sign
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
        return softcapped_cross_entropy_reference(logits, targets, self.softcaps, reduction)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the soft-cap, in float32: what probabilities are made of."""
        return soft_cap(logits.float(), self.softcaps if self.caps_differ else self.config.logit_softcap)

    def _embed(self, tokens: Tensor, embedding: Tensor, documents: Documents) -> Tensor:
        """The first layer's input, (rows, length, dim)."""
        config, starts = self.config, documents.starts
        if config.smear_gate_enabled:
            gate = self._cast("smear_gate"), self._cast("smear_lambda")
            if config.smear_gate_bos_fix:
                starts = starts | (tokens == config.bos_id)
            if not config.bigram_vocab_size:
                fused = "embedding_smear_norm" in self.fused
                embed = ops.embedding_smear_norm if fused else embedding_smear_norm_reference
                return embed(tokens, embedding, *gate, starts)
        x = F.embedding(tokens, embedding)
        if config.bigram_vocab_size:
            buckets = bigram_buckets(tokens, documents.starts, config.bigram_vocab_size)
            names = ("bigram_embedding", "bigram_projection", "bigram_scale")
            x = x + bigram_embedding(buckets, *map(self._cast, names))
        if config.smear_gate_enabled:
            x = smear(x, *gate, starts)
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
        stream = (FusedStream if "residual_rms_norm" in self.fused else Stream)(x)
        lanes: Lanes | None = None
        for visit in self.visits[self.looping]:
            layer = layers[visit.layer]
            if lanes is None and config.two_lanes(visit):
                lanes = (FusedLanes if "two_lane_rms_norm" in self.fused else Lanes)(stream)
            if visit.skip is not None:
                (lanes or stream).skip(weights[visit.skip], gates[visit.skip])
            if lanes is not None:
                self._two_lane_layer(layer, lanes, x0, batch, observe)
            elif config.parallel(visit.layer):
                self._parallel_layer(layer, stream, x0, batch, observe)
            else:
                self._layer(layer, stream, x0, batch, observe)
            if visit.stores:
                stream.store()
        return stream.norm() if lanes is None else lanes.merged_norm(config.parallel_final_lane)

    def _layer(self, layer: Layer, stream: Stream, x0: Tensor, batch: Batch, observe: Observer | None) -> None:
        scale = self.config.norm_scale(layer.number)
        stream.mix(x0, layer.mix)
        stream.add(self._attend(layer, stream.norm(scale), batch, observe))
        stream.add(self._mlp(layer, stream.norm(scale), observe))

    def _parallel_layer(self, layer: Layer, stream: Stream, x0: Tensor, batch: Batch, observe: Observer | None) -> None:
        """GPT-J form, PRs #1204 and #1412: one norm, and both branches read it."""
        stream.mix(x0, layer.mix)
        h = stream.norm(self.config.norm_scale(layer.number))
        stream.add(self._attend(layer, h, batch, observe))
        stream.add(self._mlp(layer, h, observe))

    def _two_lane_layer(self, layer: Layer, lanes: Lanes, x0: Tensor, batch: Batch, observe: Observer | None) -> None:
        h, of_second = lanes.norms(x0, layer.mix, self.config.norm_scale(layer.number))
        attended = self._attend(layer, h, batch, observe)
        lanes.route(attended, self._mlp(layer, of_second, observe), layer.keep, layer.post)

    def _attend(self, layer: Layer, h: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        """Attention of the normalised input h (rows, length, dim), with its output projection."""
        config, documents = self.config, batch.documents
        if observe:
            observe("qo_bank", layer.number, h)
            observe("kv_bank", layer.number, h)
            observe("kv_bank", config.num_layers + layer.number, h)
        gain = layer.gain
        if (sharpen := score_scale(config.rope_scaling, self._stretch(documents))) != 1.0:
            gain = gain * sharpen
        if layer.joined is not None:
            q, k, v, own, logits = self._take_apart(layer, F.linear(h, layer.joined), batch, gain)
        else:
            query = F.linear(h, layer.q)
            k = F.linear(h, layer.k).unflatten(-1, (config.num_kv_heads, -1))
            v = F.linear(h, layer.v)
            if layer.number in batch.values:
                v = v + batch.values[layer.number]
            v = own = v.unflatten(-1, (config.num_kv_heads, -1))
            q, k = self._norm_and_rotate(query.unflatten(-1, (config.num_heads, -1)), k, batch.rotary, gain)
            logits = gate_logits(query if config.gates_by_query else h, layer.gate) if config.gates else None
        y = attention(q, k, v, documents.cu_seqlens, documents.longest, self.attention)
        y = self._exclude_and_gate(layer, y, own, logits).flatten(-2)
        if observe:
            observe("qo_bank", config.num_layers + layer.number, y)
        return F.linear(y, layer.out)

    def _take_apart(
        self, layer: Layer, projected: Tensor, batch: Batch, gain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q and k for attention, v for attention and for XSA, and the gate's logits, of one product."""
        config, added = self.config, batch.values.get(layer.number)
        readers = 2 if added is None and config.excludes_self(layer.number) else 1
        q, k, (v, *again), logits = ops.qkv_norm_rope(
            projected, *batch.rotary, gain, config.num_kv_heads, config.head_dim, readers, config.gates
        )
        if added is not None:
            v = v + added.view_as(v)
        return q, k, v, again[0] if again else v, logits if config.gates else None

    def _norm_and_rotate(
        self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor], gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm_and_rotate = ops.qk_norm_rope if "qk_norm_rope" in self.fused else qk_norm_rope_reference
        return norm_and_rotate(q, k, *rotary, gain)

    def _exclude_and_gate(self, layer: Layer, y: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        config = self.config
        gain, scale = (2.0, 1.0) if config.attn_out_gate_enabled else (1.0, config.sparse_attn_gate_scale)
        if config.excludes_self(layer.number):
            return (ops.xsa_gate if "xsa_gate" in self.fused else xsa_gate_reference)(y, v, logits, gain, scale)
        return y if logits is None else gate_heads(y, logits, gain, scale)

    def _mlp(self, layer: Layer, h: Tensor, observe: Observer | None) -> Tensor:
        slope = self.config.mlp_slope
        if observe:
            observe("up_bank", layer.number, h)
            observe("down_bank", layer.number, activation(h, layer.up, slope).square())
        return ops.leaky_relu2_mlp(h, layer.up, layer.down, slope)

    def _weights(self) -> list[Layer]:
        """One cast and one unbind a bank: the gradient of a bank is then stacked once, not padded layer by layer.

        What scales a branch by channel scales the rows of its last matrix: no pass over the tokens, and nothing kept
        for it, forward or backward.
        """
        layers = self.config.num_layers
        q, out = self._bank("qo_bank").split(layers)
        k, v = self._bank("kv_bank").split(layers)
        out = out * self.attn_scale.unsqueeze(-1)
        down = self._bank("down_bank") * self.mlp_scale.unsqueeze(-1)
        banks = [bank.to(self.dtype) for bank in (q, k, v, out, self._bank("up_bank"), down)]
        names = ("q_gain", "resid_mix", "attn_gate", "parallel_resid_lambdas", "parallel_post_lambdas")
        parts: list[Sequence[Any]] = [bank.unbind(0) for bank in banks]
        parts += [self._rows(name, layers) for name in names]
        parts.append(self._join(*banks[:3]).unbind(0) if "qkv_norm_rope" in self.fused else (None,) * layers)
        return [Layer(i, *(rows[i] for rows in parts)) for i in range(layers)]

    def _join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v of all layers and the gate, if any, as one bank (layers, columns, dim).

        Rows of zeros make the columns a multiple of 64. 8 would do for the product, but torch.compile lays out the rows
        of longer results at multiples of 128 bytes and then copies each part for the operation that reads it.
        """
        banks = [q, k, v]
        if self.config.gates:
            banks.append(gate_rows(self._cast("attn_gate"), q if self.config.gates_by_query else None, q.size(-1)))
        columns = sum(bank.size(1) for bank in banks)
        if columns % 64:
            banks.append(q.new_zeros(q.size(0), -columns % 64, q.size(2)))
        return torch.cat(banks, dim=1)

    def _bank(self, name: str) -> Tensor:
        bank = getattr(self, name)
        return bank if self.fake_quantize is None else self.fake_quantize(name, bank)

    def _cast(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""
        return getattr(self, name).to(self.dtype)

    def _rows(self, name: str, count: int) -> Sequence[Any]:
        """A parameter's rows in the compute dtype, or nothing that often where the technique is off."""
        return self._cast(name).unbind(0) if name in self._parameters else (None,) * count
