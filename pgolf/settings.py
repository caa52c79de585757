"""Every setting of a run: one typed, validated object, filled from a preset and from environment variables.

`PRESET=demo SEED=42 QK_GAIN_INIT=5 torchrun ... train_gpt.py`: each field is set by the variable of its upper-case
name, as this community's scripts do. A wrong value, or a variable one slip away from a field's name, ends the run with
one line.
"""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgolf.errors import UserError

DEMO_DATA_PATH = "data/datasets/demo_sp1024"
DEMO_TOKENIZER_PATH = "data/tokenizers/demo_1024_bpe.model"
FINEWEB_DATA_PATH = "data/datasets/fineweb10B_sp1024"
FINEWEB_TOKENIZER_PATH = "data/tokenizers/fineweb_1024_bpe.model"


class Settings(BaseModel):
    """The resolved settings of one run. The defaults are the challenge's naive baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "baseline"
    run_id: str = ""  # "" becomes <time>-<preset>-s<seed>
    out_dir: str = "runs"
    resume: str = ""  # the folder of an interrupted run

    # data
    data_path: str = FINEWEB_DATA_PATH  # folder of *_train_*.bin and *_val_*.bin shards
    tokenizer_path: str = FINEWEB_TOKENIZER_PATH
    vocab_size: int = Field(1024, ge=2, le=65536)
    loader: Literal["shuffled", "coprime", "documents"] = "shuffled"  # documents: packed, with borders between them

    # model
    num_layers: int = Field(9, gt=0)
    model_dim: int = Field(512, gt=0)
    num_heads: int = Field(8, gt=0)
    num_kv_heads: int = Field(4, gt=0)
    mlp_mult: float = Field(2.0, gt=0)  # hidden width over model width
    mlp_slope: float = Field(0.0, ge=0, le=1)  # leaky_relu(z, slope)^2; 0 is relu^2
    rope_base: float = Field(10_000.0, gt=1)
    qk_gain_init: float = Field(1.5, gt=0)
    logit_softcap: float = Field(30.0, gt=0)
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
    adam_weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)

    # quantisation and artifact
    quantizer: Literal["rtn", "gptq", "gptq_cd", "trellis"] = "trellis"
    matrix_bits: int = Field(6, ge=2, le=8)
    embed_bits: int = Field(8, ge=2, le=8)
    matrix_clip_sigmas: float = Field(12.85, gt=0)
    embed_clip_sigmas: float = Field(20.0, gt=0)
    gptq_damping: float = Field(0.01, gt=0)
    gptq_calibration_batches: int = Field(16, gt=0)  # of train_batch_tokens
    gptq_reserve_seconds: float = Field(8.0, ge=0)  # kept back from training for calibration
    budget_bytes: int = Field(16_000_000, gt=0)  # code + artifact
    artifact_bytes: int = Field(0, ge=0)  # steps are chosen to fill these; 0: the steps of *_clip_sigmas

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
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on where there is a GPU
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
        hidden = self.mlp_mult * self.model_dim
        need(hidden == int(hidden), f"MLP_MULT={self.mlp_mult:g} x MODEL_DIM={self.model_dim} must be a whole number")
        for name in ("train_batch_tokens", "micro_batch_tokens"):
            value = getattr(self, name)
            need(
                value % self.train_seq_len == 0,
                f"{name.upper()}={value} must be a multiple of TRAIN_SEQ_LEN={self.train_seq_len}",
            )
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
        context = self.eval_seq_len or self.train_seq_len
        need(
            self.eval_stride <= context,
            f"EVAL_STRIDE={self.eval_stride} must be at most EVAL_SEQ_LEN={context}, or tokens would be left out",
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
    def run_folder(self) -> Path:
        return Path(self.out_dir) / self.run_id


PRESETS: dict[str, dict[str, Any]] = {
    # The challenge's naive baseline: 1.2244 bpb in 600 s on 8 H100 (13,780 steps).
    "baseline": {},
    # Small enough for two CPU cores, on text that every Python installation carries.
    "demo": {
        "data_path": DEMO_DATA_PATH,
        "tokenizer_path": DEMO_TOKENIZER_PATH,
        "num_layers": 3,
        "model_dim": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_mult": 3.0,
        "mlp_slope": 0.5,
        "qk_gain_init": 4.0,
        "max_wallclock_seconds": 130.0,
        "gptq_reserve_seconds": 6.0,
        "train_batch_tokens": 4096,
        "micro_batch_tokens": 4096,
        "train_seq_len": 256,
        "warmup_steps": 1,
        "warmdown_frac": 0.6,
        "min_lr": 0.05,
        "grad_clip_norm": 1.0,
        "ema_decay": 0.97,
        "matrix_lr": 0.015,
        "tied_embed_lr": 0.01,
        "scalar_lr": 0.02,
        "muon_momentum_warmup_steps": 100,
        "muon_coefficients": "polar_express",
        "muon_row_normalize": True,
        "muon_weight_decay": 0.05,
        "val_loss_every": 0,
        "val_batch_size": 8192,
        "train_log_every": 10,
    },
}


def default_preset(cuda: bool) -> str:
    """`baseline` where there is a GPU and FineWeb is at hand, else `demo`."""
    return "baseline" if cuda and any(Path(FINEWEB_DATA_PATH).glob("*_train_*.bin")) else "demo"


def load_settings(environ: Mapping[str, str] | None = None, preset: str | None = None, cuda: bool = False) -> Settings:
    """Resolve preset and variables; `UserError` with one line for whatever cannot be used."""
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
