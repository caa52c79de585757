"""Every setting of a run: one typed, validated object, filled from a preset and from environment variables.

`PRESET=demo SEED=42 QK_GAIN_INIT=5 torchrun ... train_gpt.py`: each field is set by the variable of its upper-case
name, as this community's scripts do. A wrong value, or a variable one slip away from a field's name, ends the run with
one line.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgolf.errors import UserError
from pgolf.presets import FINEWEB, FINEWEB_TOKENIZER, PRESETS, default_preset


class Settings(BaseModel):
    """The resolved settings of one run. The defaults are the challenge's naive baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "baseline"
    run_id: str = ""  # "" becomes <time>-<preset>-s<seed>
    out_dir: str = "runs"
    resume: str = ""  # the folder of an interrupted run, which several machines must share

    # data
    data_path: str = FINEWEB["sp1024"]  # folder of *_train_*.bin and *_val_*.bin shards
    tokenizer_path: str = FINEWEB_TOKENIZER["sp1024"]
    vocab_size: int = Field(1024, ge=2, le=65536)
    loader: Literal["shuffled", "coprime", "documents"] = "shuffled"  # documents: packed, with borders between them

    # model
    num_layers: int = Field(9, gt=0)
    model_dim: int = Field(512, gt=0)
    num_heads: int = Field(8, gt=0)
    num_kv_heads: int = Field(4, gt=0)
    mlp_mult: float = Field(2.0, gt=0)  # hidden width over model width
    mlp_slope: float = Field(0.0, ge=0, le=1)  # leaky_relu(z, slope)^2; 0 is relu^2
    # attention
    rope_base: float = Field(10_000.0, gt=1)
    rope_dims: int = Field(0, ge=0)  # of a head, that are rotated; 0: all
    rope_scaling: Literal["none", "ntk", "yarn"] = "none"  # for documents longer than
    rope_train_seq_len: int = Field(1024, gt=0)  # this
    qk_gain_init: float = Field(1.5, gt=0)
    xsa_last_n: int = Field(0, ge=0)  # layers with exclusive self-attention
    attn_out_gate_enabled: bool = False  # 2 sigmoid(W x[:GATE_WINDOW]) a head
    attn_out_gate_src: Literal["proj", "q"] = "proj"  # x: the layer's input, or the query
    sparse_attn_gate_enabled: bool = False  # sigmoid(scale W x[:GATE_WINDOW]) a head
    sparse_attn_gate_scale: float = Field(1.0, gt=0)
    gate_window: int = Field(12, gt=0)  # channels that attention's gate and SmearGate read

    # residual stream
    ln_scale: bool = False  # layer l's norms times 1 / sqrt(l + 1)
    unet_skips: bool = True
    skip_gates_enabled: bool = False
    num_loops: int = Field(0, ge=0)  # depth recurrence: so many more passes over the layers
    loop_start: int = Field(0, ge=0)  # from this one
    loop_end: int = Field(0, ge=0)  # to this one
    parallel_residual_start: int = Field(-1, ge=-1)  # attention and MLP side by side from this layer on; -1: none
    parallel_start_layer: int = Field(0, ge=0)  # two lanes from this layer of the second half on; 0: none
    parallel_final_lane: Literal["mean", "attn", "mlp"] = "mean"

    # embeddings and logits
    smear_gate_enabled: bool = False
    smear_gate_bos_fix: bool = True  # BOS_ID takes in nothing of the token before it
    bos_id: int = Field(1, ge=0)
    bigram_vocab_size: int = Field(0, ge=0)  # buckets; 0: none
    bigram_dim: int = Field(128, gt=0)
    ve_layers: str = ""  # with value embeddings, like "9,10"
    ve_dim: int = Field(128, gt=0)
    logit_softcap: float = Field(30.0, gt=0)
    asym_logit_rescale: bool = False  # a cap for each sign, for test-time training
    tied_embed_init_std: float = Field(0.005, gt=0)

    # training
    seed: int = Field(1337, ge=0)
    iterations: int = Field(20_000, gt=0)  # optimiser steps at most
    max_wallclock_seconds: float = Field(600.0, gt=0)  # training, calibration included
    max_eval_seconds: float = Field(600.0, gt=0)
    train_batch_tokens: int = Field(524_288, gt=0)  # a step, over all ranks
    micro_batch_tokens: int = Field(65_536, gt=0)  # a forward pass, on one rank
    train_seq_len: int = Field(1024, gt=0)
    train_seq_schedule: str = ""  # "1024@0.1,2048@0.7": so long until this fraction of the budget; then TRAIN_SEQ_LEN
    enable_looping_at: float = Field(0.35, ge=0, le=1)  # fraction of the budget from which layers are looped
    warmup_steps: int = Field(20, ge=0)  # untimed; weights and optimiser are restored after
    warmdown_frac: float = Field(0.08, ge=0, le=1)  # last part of the budget, in which the learning rate falls
    min_lr: float = Field(0.0, ge=0, le=1)  # floor of the falling learning rate, as a fraction of it
    grad_clip_norm: float = Field(0.0, ge=0)  # 0: none
    ema_decay: float = Field(0.0, ge=0, lt=1)  # 0: none
    swa_every: int = Field(0, ge=0)  # steps between the weights that are averaged; 0: none
    swa_start_frac: float = Field(0.5, gt=0, le=1)  # they are taken once the learning rate is this fraction or less
    qat: Literal["none", "ste", "soft_round"] = "none"  # training sees banks rounded to MATRIX_BITS
    late_qat_threshold: float = Field(1.0, gt=0, le=1)  # as SWA_START_FRAC; 1: from the first step
    byte_weighted_loss: bool = False  # a token's loss counts by its bytes of text
    mtp_tokens: int = Field(0, ge=0)  # tokens after the next one that are predicted too
    mtp_loss_weight: float = Field(0.2, ge=0)  # of each of them at the start; it falls to 0 at the end
    abort_step: int = Field(0, ge=0)  # validate after this step; 0: not
    abort_bpb: float = Field(0.0, ge=0)  # and end the run if it is worse than this; 0: never

    # optimiser
    matrix_lr: float = Field(0.04, ge=0)
    tied_embed_lr: float = Field(0.05, ge=0)
    scalar_lr: float = Field(0.04, ge=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_momentum_warmup_start: float = Field(0.85, ge=0, lt=1)
    muon_momentum_warmup_steps: int = Field(500, ge=0)
    muon_backend_steps: int = Field(5, gt=0)
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    muon_row_normalize: bool = False  # MuonEq-R
    muon_weight_decay: float = Field(0.0, ge=0)
    muon_beta2: float = Field(0.0, ge=0, lt=1)  # NorMuon's variance reduction; 0: none
    muon_renormalize: Literal["none", "row", "column", "row_column", "column_row"] = "none"  # Muon+
    muon_late_layer: int = Field(0, ge=0)  # Split-LR: from this layer on,
    muon_late_lr_mult: float = Field(1.0, ge=0)  # banks learn at so many times MATRIX_LR
    embed_weight_decay: float = Field(0.0, ge=0)
    adam_weight_decay: float = Field(0.0, ge=0)  # of the small parameters
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)

    # quantisation and artifact
    quantizer: Literal["rtn", "gptq", "gptq_cd", "trellis"] = "trellis"
    matrix_bits: int = Field(6, ge=2, le=8)
    embed_bits: int = Field(8, ge=2, le=16)  # 2 to 8; 16: float16, as it is
    matrix_clip_sigmas: float = Field(12.85, gt=0)
    attn_clip_sigmas: float = Field(0.0, ge=0)  # 0: MATRIX_CLIP_SIGMAS
    mlp_clip_sigmas: float = Field(0.0, ge=0)  # 0: MATRIX_CLIP_SIGMAS
    embed_clip_sigmas: float = Field(20.0, gt=0)
    attn_bits: int = Field(0, ge=0, le=8)  # of one role; 0: as MATRIX_BITS
    mlp_bits: int = Field(0, ge=0, le=8)
    lqer_rank: int = Field(0, ge=0)  # of the low-rank corrections; 0: none
    lqer_top_k: int = Field(3, gt=0)  # matrices that get one
    lqer_factor_bits: int = Field(4, ge=2, le=8)
    gptq_damping: float = Field(0.01, gt=0)
    gptq_calibration_batches: int = Field(16, gt=0)  # of train_batch_tokens
    gptq_reserve_seconds: float = Field(8.0, ge=0)  # kept back from training for calibration
    budget_bytes: int = Field(16_000_000, gt=0)  # code + artifact
    artifact_bytes: int = Field(0, ge=0)  # steps are chosen to fill these; 0: *_clip_sigmas, larger if over budget
    artifact_coder: Literal["mix", "static"] = "mix"  # small, or fast

    # evaluation with a causal n-gram cache, besides the model alone
    ngram: Literal["off", "adaptive", "dirichlet", "pyp", "tilt"] = "off"
    ngram_order: int = Field(0, ge=0, le=16)  # highest; 0: 7, of tilt 16
    ngram_memory_bytes: int = Field(1 << 30, ge=1 << 22, le=1 << 36)  # at most; a short split takes less
    ngram_threshold: float = Field(0.8, gt=0, le=1)  # of tilt: a hint came true in this share of its cases, or no tilt
    ngram_boost: float = Field(2.625, ge=-50, le=50)  # of tilt: what it adds to the hint's logit, in nats

    # scoring
    eval_seq_len: int = Field(0, ge=0)  # tokens of context at most; 0: TRAIN_SEQ_LEN
    eval_stride: int = Field(0, ge=0)  # tokens scored by each further window; 0: EVAL_SEQ_LEN, without overlap
    eval_documents: bool = False  # each document alone, from its beginning

    # logging and machine
    val_loss_every: int = Field(1000, ge=0)  # 0: only at the end
    val_batch_size: int = Field(65_536, gt=0)  # tokens a forward pass, on one rank
    train_log_every: int = Field(200, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "flash3", "flash4", "varlen", "sdpa", "plain"] = "auto"
    fused_glue: Literal["auto", "on", "off"] = "auto"  # what runs between matrix products: pgolf/model/glue.py
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on where there is a GPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # replay forward and backward: pgolf/cuda_graphs.py
    process_timeout_seconds: float = Field(300.0, gt=0)  # for an answer of another process; longer than it compiles

    @model_validator(mode="after")
    def _shapes_agree(self) -> "Settings":
        def need(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(message)

        head_dim, rest = divmod(self.model_dim, self.num_heads)
        need(rest == 0, f"MODEL_DIM={self.model_dim} must be a multiple of NUM_HEADS={self.num_heads}")
        need(head_dim % 2 == 0, f"MODEL_DIM / NUM_HEADS = {head_dim} must be even, for rotary embeddings")
        need(
            self.num_heads % self.num_kv_heads == 0,
            f"NUM_HEADS={self.num_heads} must be a multiple of NUM_KV_HEADS={self.num_kv_heads}",
        )
        need(
            self.rope_dims % 2 == 0 and self.rope_dims <= head_dim,
            f"ROPE_DIMS={self.rope_dims} must be even and at most MODEL_DIM / NUM_HEADS = {head_dim}",
        )
        self._model_parts_agree(need)
        hidden = self.mlp_mult * self.model_dim
        need(hidden == int(hidden), f"MLP_MULT={self.mlp_mult:g} x MODEL_DIM={self.model_dim} must be a whole number")
        need(self.embed_bits <= 8 or self.embed_bits == 16, f"EMBED_BITS={self.embed_bits}: must be 2 to 8, or 16")
        for name in ("train_batch_tokens", "micro_batch_tokens"):
            value = getattr(self, name)
            need(
                value % self.train_seq_len == 0,
                f"{name.upper()}={value} must be a multiple of TRAIN_SEQ_LEN={self.train_seq_len}",
            )
        for name in ("attn_bits", "mlp_bits"):
            need(getattr(self, name) != 1, f"{name.upper()}=1 must be 2 to 8, or 0 for MATRIX_BITS")
        need(
            self.gptq_reserve_seconds < self.max_wallclock_seconds,
            f"MAX_WALLCLOCK_SECONDS={self.max_wallclock_seconds:g} leaves no time to train: "
            f"GPTQ_RESERVE_SECONDS={self.gptq_reserve_seconds:g} of it are kept for calibration",
        )
        need(
            self.run_id == Path(self.run_id).name and self.run_id not in (".", ".."),
            f"RUN_ID={self.run_id!r} must be a plain file name",
        )
        return self

    def _model_parts_agree(self, need: Callable[[bool, str], None]) -> None:
        layers = self.num_layers
        if self.num_loops:
            need(
                self.loop_start <= self.loop_end < layers,
                f"LOOP_START={self.loop_start}, LOOP_END={self.loop_end}: must be 0 to {layers - 1}, in order",
            )
            virtual = layers + self.num_loops * (self.loop_end - self.loop_start + 1)
            need(virtual <= 1000, f"NUM_LOOPS={self.num_loops}: {virtual} layers would run, 1000 may")
        need(
            not (self.parallel_start_layer and self.parallel_residual_start >= 0),
            f"PARALLEL_START_LAYER={self.parallel_start_layer} and "
            f"PARALLEL_RESIDUAL_START={self.parallel_residual_start}: only one form of parallel residuals at once",
        )
        first = self.loop_end + 1 if self.num_loops else 1
        need(
            not self.parallel_start_layer or first <= self.parallel_start_layer < layers,
            f"PARALLEL_START_LAYER={self.parallel_start_layer}: must be 0, or after the loop and a layer: {first} to "
            f"NUM_LAYERS - 1 = {layers - 1}",
        )
        need(
            not (self.attn_out_gate_enabled and self.sparse_attn_gate_enabled),
            "ATTN_OUT_GATE_ENABLED=1 and SPARSE_ATTN_GATE_ENABLED=1: attention has one gate at most",
        )
        need(self.gate_window <= self.model_dim, f"GATE_WINDOW={self.gate_window} is more than MODEL_DIM")
        need(self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: must be 0 or at least 2")
        names = [name.strip() for name in self.ve_layers.split(",") if name.strip()]
        need(
            all(name.isdecimal() and int(name) < layers for name in names) and len({*names}) == len(names),
            f"VE_LAYERS={self.ve_layers!r}: must be different layers below NUM_LAYERS={layers}, like 1,2",
        )

    @model_validator(mode="after")
    def _schedules_agree(self) -> "Settings":
        def need(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(message)

        for _, length in self.train_seq_stages:
            need(
                length <= self.train_seq_len and (self.loader == "documents" or self.train_seq_len % length == 0),
                f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule}: {length} must divide TRAIN_SEQ_LEN={self.train_seq_len}"
                " (LOADER=documents takes any length up to it)",
            )
        for name, chosen in (("late_qat_threshold", self.qat != "none"), ("swa_start_frac", self.swa_every > 0)):
            threshold = getattr(self, name)
            need(
                not chosen or threshold == 1 or (self.warmdown_frac > 0 and threshold >= self.min_lr),
                f"{name.upper()}={threshold:g} is never reached: with WARMDOWN_FRAC={self.warmdown_frac:g} and "
                f"MIN_LR={self.min_lr:g} the learning rate stays above it",
            )
        need(
            not (self.ema_decay and self.swa_every),
            f"EMA_DECAY={self.ema_decay:g} and SWA_EVERY={self.swa_every}: only one of the two can become the weights",
        )
        need(
            self.abort_step > 0 or not self.abort_bpb,
            f"ABORT_BPB={self.abort_bpb:g} needs ABORT_STEP, the step after which it is looked at",
        )
        need(
            self.eval_stride <= self.scoring["seq_len"],
            f"EVAL_STRIDE={self.eval_stride} must be at most EVAL_SEQ_LEN={self.scoring['seq_len']}, "
            "or tokens would be left out",
        )
        return self

    @property
    def train_seq_stages(self) -> list[tuple[float, int]]:
        """(fraction of the budget where it ends, sequence length) of each stage of training; the last ends at 1."""
        stages: list[tuple[float, int]] = []
        for stage in filter(None, self.train_seq_schedule.replace(" ", "").split(",")):
            length, _, end = stage.partition("@")
            try:
                stages.append((float(end), int(length)))
            except ValueError:
                stages.append((math.nan, 0))
            (before, _), (last, tokens) = stages[-2] if len(stages) > 1 else (0.0, 0), stages[-1]
            if not (before < last <= 1 and tokens > 0):
                raise ValueError(
                    f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule}: {stage!r} must be LENGTH@FRACTION, each fraction "
                    "of the budget larger than the one before and at most 1"
                )
        if not stages or stages[-1][0] < 1:
            stages.append((1.0, self.train_seq_len))
        return stages

    @property
    def scoring(self) -> dict[str, Any]:
        """How the validation split is cut: arguments of `evaluate`, kept in the artifact."""
        borders = self.bos_id if self.eval_documents else None
        return {"seq_len": self.eval_seq_len or self.train_seq_len, "stride": self.eval_stride, "bos_id": borders}

    @property
    def longest_text(self) -> int:
        """Tokens that see each other, at most."""
        return max(self.train_seq_len, self.scoring["seq_len"])

    @property
    def run_folder(self) -> Path:
        return Path(self.out_dir) / self.run_id


def load_settings(environ: Mapping[str, str] | None = None, preset: str | None = None, cuda: bool = False) -> Settings:
    """The settings of a run, from a preset and from variables of the fields' upper-case names.

    Args:
        environ: {"PRESET": name, "MODEL_DIM": "384", ...}, other variables are left alone; None: the environment.
        preset: where environ names none; None: the best system whose data is there with `cuda`, else "demo".
        cuda: whether there is a GPU, for that choice.
    Returns:
        `Settings`, frozen; `run_id` is made up where none is given.
    Raises:
        UserError: one line for whatever cannot be used: a wrong value, an unknown preset, settings that contradict each
            other, a variable one slip away from a field's name.
    Example:
        >>> from pgolf.settings import load_settings
        >>> settings = load_settings({"PRESET": "demo", "SEED": "42", "NUM_LAYERS": "2"})
        >>> settings.preset, settings.seed, settings.num_layers
        ('demo', 42, 2)

    Source: presets name their entries of the challenge in pgolf/presets.py.
    """
    environ = os.environ if environ is None else environ
    _refuse_near_names(environ)
    given = {name: environ[name.upper()] for name in Settings.model_fields if name.upper() in environ}
    preset = given.pop("preset", None) or preset or default_preset(cuda)
    if preset not in PRESETS:
        raise UserError(f"PRESET={preset}: no such preset; accepted are {', '.join(sorted(PRESETS))}")
    given = {name: value.strip() for name, value in given.items()}
    if "run_id" not in given:
        seed = given.get("seed", PRESETS[preset].get("seed", Settings.model_fields["seed"].default))
        given["run_id"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}-s{seed}"
    return validate({"preset": preset, **PRESETS[preset], **given})


def validate(values: dict[str, Any]) -> Settings:
    """Build `Settings`, turning the first thing that is wrong into one line."""
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule between several fields; its message names them
            raise UserError(str(first["ctx"]["error"])) from None
        name = str(first["loc"][0])
        if name not in Settings.model_fields:
            raise UserError(f"{name}: no such setting") from None
        message = first["msg"].removeprefix("Input should be ")
        raise UserError(f"{name.upper()}={first['input']}: must be {message}") from None


def _refuse_near_names(environ: Mapping[str, str]) -> None:
    fields = {name.upper() for name in Settings.model_fields}
    for variable in environ:
        if variable in fields:
            continue
        for field in fields:
            allowed = 1 if len(field) < 10 else 2
            if len(field) >= 4 and _edit_distance(variable.upper(), field, allowed) <= allowed:
                raise UserError(f"{variable}={environ[variable]}: no such setting; did you mean {field}?")


def _edit_distance(a: str, b: str, limit: int) -> float:
    """Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`; infinite past `limit`."""
    if abs(len(a) - len(b)) > limit:
        return math.inf
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]
