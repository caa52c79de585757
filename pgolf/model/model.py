"""The forward pass. Training, calibration, scoring and test-time training all call this one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf import ops
from pgolf.model.attention_gate import gate_rows
from pgolf.model.bigram_hash import bigram_buckets, bigram_embedding
from pgolf.model.config import ModelConfig
from pgolf.model.documents import Documents, packed_documents, rows_as_documents
from pgolf.model.execution import Execution
from pgolf.model.initialise import initialise
from pgolf.model.lanes import Routing, merge_lanes, part_lanes, route_lanes
from pgolf.model.layer import Batch, Layer, Observer, attention_branch, mlp_branch
from pgolf.model.recurrence import Visit
from pgolf.model.residual import add_branch, add_mix_norm, add_norm
from pgolf.model.rotary import rotary_tables, score_scale
from pgolf.model.skips import Skip
from pgolf.model.value_embedding import value_embeddings
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference, smear
from pgolf.ops.residual_rms_norm import norm
from pgolf.ops.softcapped_cross_entropy import soft_cap, softcapped_cross_entropy_reference

# (name, bank) -> what the forward pass takes in place of the bank; called once a pass.
FakeQuantizer = Callable[[str, Tensor], Tensor]

PLAIN = Execution()


class Model(nn.Module):
    """Parameters are float32, their shapes in `ModelConfig.shapes`; the forward pass computes as `execution` says.

    Changed by methods alone: `execution` by `execute`, `looping` and `fake_quantize` by `enter`, `caps_differ` by
    `weights_changed`.
    """

    embedding: nn.Parameter
    attn_scale: nn.Parameter
    mlp_scale: nn.Parameter
    softcaps: nn.Parameter

    def __init__(self, config: ModelConfig, execution: Execution = PLAIN):
        super().__init__()
        self.config = config
        self.visits = {looping: config.visits(looping) for looping in (False, True)}
        self.caps_differ = False  # whether test-time training has moved the two soft-caps, one for each sign
        self.execute(execution)
        self.enter(looping=config.num_loops > 0)
        for name, shape in config.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def initialise(self, generator: torch.Generator) -> "Model":
        initialise(dict(self.named_parameters()), self.config, generator)
        return self

    def execute(self, execution: Execution) -> None:
        """Compute so from now on."""
        self.execution = execution

    def enter(self, *, looping: bool, fake_quantize: FakeQuantizer | None = None) -> None:
        """Run with depth recurrence or without, and on banks as they are or as `fake_quantize` makes them.

        The compiler guards both: each combination has a graph of its own.
        """
        self.looping, self.fake_quantize = looping, fake_quantize

    def weights_changed(self) -> None:
        """To be called once parameters were overwritten. Looks at the soft-caps, for which the host waits."""
        if self.config.asym_logit_rescale:
            self.caps_differ = bool((self.softcaps != self.config.logit_softcap).any())

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        found = super().load_state_dict(*arguments, **options)
        self.weights_changed()
        return found

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
        embedding = self.embedding.to(self.execution.dtype)
        x = self._layers(self.embed(tokens, embedding, documents), self._batch(tokens, documents), observe)
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

    def embed(self, tokens: Tensor, embedding: Tensor, documents: Documents) -> Tensor:
        """The first layer's input, (rows, length, dim)."""
        config, starts = self.config, documents.starts
        if config.smear_gate_enabled:
            gate = self.cast("smear_gate"), self.cast("smear_lambda")
            if config.smear_gate_bos_fix:
                starts = starts | (tokens == config.bos_id)
            if not config.bigram_vocab_size:
                fused = "embedding_smear_norm" in self.execution.fused
                embed = ops.embedding_smear_norm if fused else embedding_smear_norm_reference
                return embed(tokens, embedding, *gate, starts)
        x = F.embedding(tokens, embedding)
        if config.bigram_vocab_size:
            buckets = bigram_buckets(tokens, documents.starts, config.bigram_vocab_size)
            names = ("bigram_embedding", "bigram_projection", "bigram_scale")
            x = x + bigram_embedding(buckets, *map(self.cast, names))
        if config.smear_gate_enabled:
            x = smear(x, *gate, starts)
        return norm(x)

    def _batch(self, tokens: Tensor, documents: Documents) -> Batch:
        config = self.config
        stretch = max(1.0, documents.longest / config.rope_train_seq_len)
        rotary = rotary_tables(
            documents.positions,
            config.rotary_dims,
            config.rope_base,
            self.execution.dtype,
            config.rope_scaling,
            stretch,
            config.rope_train_seq_len,
        )
        values: dict[int, Tensor] = {}
        if config.value_embedding_layers:
            names = ("value_embedding", "value_projection", "value_scale", "value_layer_scales")
            layers = config.value_embedding_layers
            values = dict(zip(layers, value_embeddings(tokens, *map(self.cast, names)), strict=True))
        return Batch(documents, rotary, score_scale(config.rope_scaling, stretch), values)

    def _layers(self, x0: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        """From the normalised embedding to the normalised hidden state, (rows, length, dim) both."""
        config, fused, layers = self.config, "residual_rms_norm" in self.execution.fused, self.layer_weights()
        weights, gates = self.rows("skip_weights", config.num_skips), self.rows("skip_gates", config.num_skips)
        attend = partial(attention_branch, config, self.execution, batch=batch, observe=observe)
        mlp = partial(mlp_branch, config, observe=observe)
        stored: list[Tensor] = []  # for skips, the last one first
        visits = self.visits[self.looping]

        def skip_of(visit: Visit) -> "Skip | None":  # torch 2.9 cannot trace a union unquoted
            return None if visit.skip is None else Skip(stored.pop(), weights[visit.skip], gates[visit.skip])

        x, keep_sum = x0, False
        branch: Tensor | None = None  # the stream is x + branch; keep_sum: that returns later, as a skip
        for number, visit in enumerate(visits):
            if config.two_lanes(visit):
                return self._two_lanes(x, branch, x0, visits[number:], layers, skip_of, attend, mlp)
            layer, scale = layers[visit.layer], config.norm_scale(visit.layer)
            total, x, h = add_mix_norm(x, branch, skip_of(visit), x0, layer.mix, scale, fused, keep_sum)
            if keep_sum:
                stored.append(total)
            attended = attend(layer, h)
            if config.parallel(visit.layer):  # GPT-J form, PRs #1204 and #1412: one norm, and both branches read it
                x = add_branch(x, attended)
            else:
                x, h = add_norm(x, attended, scale, fused)
            branch, keep_sum = mlp(layer, h), visit.stores
            if keep_sum and visits[number + 1].skip is not None:  # in the middle, where it returns at once
                x, branch, keep_sum = add_branch(x, branch), None, False
                stored.append(x)
        return add_norm(x, branch, 1.0, fused)[1]

    def _two_lanes(
        self,
        x: Tensor,  # the stream is x + branch
        branch: Tensor | None,
        x0: Tensor,
        visits: Sequence[Visit],  # those that are left
        layers: Sequence[Layer],
        skip_of: Callable[[Visit], Skip | None],
        attend: Callable[[Layer, Tensor], Tensor],
        mlp: Callable[[Layer, Tensor], Tensor],
    ) -> Tensor:
        """The rest of `_layers` from where the stream parts."""
        config, fused = self.config, "two_lane_rms_norm" in self.execution.fused

        def before(visit: Visit) -> "tuple[Skip | None, Tensor, Tensor, float, bool]":
            return skip_of(visit), x0, layers[visit.layer].mix, config.norm_scale(visit.layer), fused

        lanes, h, of_second = part_lanes(x, branch, *before(visits[0]))
        for visit, following in zip(visits, (*visits[1:], None), strict=True):
            layer = layers[visit.layer]
            routing = Routing([attend(layer, h), mlp(layer, of_second)], layer.keep, layer.post)
            if following is not None:
                lanes, h, of_second = route_lanes(lanes, routing, *before(following))
        return merge_lanes(lanes, routing, config.parallel_final_lane, fused)

    def layer_weights(self) -> list[Layer]:
        """One cast and one unbind a bank: the gradient of a bank is then stacked once, not padded layer by layer.

        What scales a branch by channel scales the rows of its last matrix: no pass over the tokens, and nothing kept
        for it, forward or backward.
        """
        layers = self.config.num_layers
        q, out = self._bank("qo_bank").split(layers)
        k, v = self._bank("kv_bank").split(layers)
        out = out * self.attn_scale.unsqueeze(-1)
        down = self._bank("down_bank") * self.mlp_scale.unsqueeze(-1)
        banks = [bank.to(self.execution.dtype) for bank in (q, k, v, out, self._bank("up_bank"), down)]
        names = ("q_gain", "resid_mix", "attn_gate", "parallel_resid_lambdas", "parallel_post_lambdas")
        parts: list[Sequence[Any]] = [bank.unbind(0) for bank in banks]
        parts += [self.rows(name, layers) for name in names]
        parts.append(self._join(*banks[:3]).unbind(0) if "qkv_norm_rope" in self.execution.fused else (None,) * layers)
        return [Layer(i, *(rows[i] for rows in parts)) for i in range(layers)]

    def _join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v of all layers and the gate, if any, as one bank (layers, columns, dim).

        Rows of zeros make the columns a multiple of 64. 8 would do for the product, but torch.compile lays out the rows
        of longer results at multiples of 128 bytes and then copies each part for the operation that reads it.
        """
        banks = [q, k, v]
        if self.config.gates:
            banks.append(gate_rows(self.cast("attn_gate"), q if self.config.gates_by_query else None, q.size(-1)))
        columns = sum(bank.size(1) for bank in banks)
        if columns % 64:
            banks.append(q.new_zeros(q.size(0), -columns % 64, q.size(2)))
        return torch.cat(banks, dim=1)

    def _bank(self, name: str) -> Tensor:
        bank = getattr(self, name)
        return bank if self.fake_quantize is None else self.fake_quantize(name, bank)

    def cast(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""
        return getattr(self, name).to(self.execution.dtype)

    def rows(self, name: str, count: int) -> Sequence[Any]:
        """A parameter's rows in the compute dtype, or nothing that often where the technique is off."""
        return self.cast(name).unbind(0) if name in self._parameters else (None,) * count
