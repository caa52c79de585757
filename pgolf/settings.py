"""Every setting of a run: one typed, validated object, filled from a preset, environment variables and arguments.

`PRESET=demo SEED=42 QK_GAIN_INIT=5 torchrun ... train_gpt.py`: each field is set by the variable of its upper-case
name, as this community's scripts do. Each has its default, the range that those who use it accept, and a sentence with
its unit, which `pgolf settings` prints too. A value out of range, or values that cannot go together
(pgolf/setting_rules.py), end the run with one line before the first step.
"""

import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pgolf import setting_rules
from pgolf.community_names import in_our_names, same_meaning, tell
from pgolf.errors import UserError, not_installed, one_line
from pgolf.presets import FINEWEB, FINEWEB_TOKENIZER, PRESETS, default_preset

try:
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
except ModuleNotFoundError as error:
    raise not_installed(error.name or "pydantic", "pgolf.settings") from None

MOST_LAYERS = setting_rules.MOST_LAYERS
MOST_WIDTH = 1 << 14  # of a layer, a head's queries or an embedding
MOST_LENGTH = 1 << 20  # tokens that see each other
MOST_TOKENS = 1 << 30  # of a batch
MOST_STEPS = 10**9
MOST_SECONDS = 1e7
MOST_RATE = 1000.0  # learning rates and what multiplies them
MOST_BYTES = 1 << 40


def whole(default: int, low: int, high: int, text: str) -> Any:
    return Field(default, ge=low, le=high, description=text)


def real(default: float, low: float, high: float, text: str) -> Any:
    return Field(default, ge=low, le=high, description=text)


def above(default: float, low: float, high: float, text: str) -> Any:
    """A number more than `low`, at most `high`."""
    return Field(default, gt=low, le=high, description=text)


def below(default: float, low: float, high: float, text: str) -> Any:
    """A number from `low`, less than `high`."""
    return Field(default, ge=low, lt=high, description=text)


def says(default: Any, text: str) -> Any:
    return Field(default, description=text)


def _printable(text: str) -> str:
    if not text.isprintable() or len(text.encode()) > 1000:
        raise ValueError("must be printable, 1000 bytes at most")
    return text


Text = Annotated[str, AfterValidator(_printable)]
Switch = Literal["auto", "on", "off"]


class Settings(BaseModel):
    """The resolved settings of one run. The defaults are the challenge's naive baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: Text = says("baseline", "a named system; `pgolf presets` lists them")
    run_id: Text = says("", "name of the run's folder; empty: <time>-<preset>-s<seed>, -2 where taken")
    out_dir: Text = says("runs", "folder of the runs' folders")
    resume: Text = says("", "folder of an interrupted run to go on with; several machines must share it")

    # data
    data_path: Text = says(FINEWEB["sp1024"], "folder of *_train_*.bin and *_val_*.bin shards")
    tokenizer_path: Text = says(FINEWEB_TOKENIZER["sp1024"], "SentencePiece model that the shards were made with")
    vocab_size: int = whole(1024, 2, 1 << 16, "pieces of the tokenizer")
    loader: Literal["shuffled", "coprime", "documents"] = says(
        "shuffled", "order of the rows; documents: packed, with borders between them"
    )

    # model
    num_layers: int = whole(9, 1, MOST_LAYERS, "layers")
    model_dim: int = whole(512, 1, MOST_WIDTH, "width of the residual stream")
    num_heads: int = whole(8, 1, 1024, "attention heads")
    num_kv_heads: int = whole(4, 1, 1024, "heads of keys and values, a divisor of NUM_HEADS")
    mlp_mult: float = above(2.0, 0, 64, "hidden width of an MLP over MODEL_DIM")
    mlp_slope: float = real(0.0, 0, 1, "of leaky_relu(z, slope)^2; 0 is relu^2")
    # attention
    rope_base: float = above(10_000.0, 1, 1e10, "base of the rotary frequencies")
    rope_dims: int = whole(0, 0, MOST_WIDTH, "dimensions of a head that are rotated; 0: all")
    rope_scaling: Literal["none", "ntk", "yarn"] = says("none", "for documents longer than ROPE_TRAIN_SEQ_LEN")
    rope_train_seq_len: int = whole(1024, 1, MOST_LENGTH, "tokens; longer documents are what ROPE_SCALING is for")
    qk_gain_init: float = above(1.5, 0, 1000, "what queries are multiplied by after their norm, at first")
    xsa_last_n: int = whole(0, 0, MOST_LAYERS, "last layers with exclusive self-attention")
    attn_out_gate_enabled: bool = says(False, "2 sigmoid(W x[:GATE_WINDOW]) on each head's output")
    attn_out_gate_src: Literal["proj", "q"] = says("proj", "what ATTN_OUT_GATE reads: the layer's input, or the query")
    sparse_attn_gate_enabled: bool = says(False, "sigmoid(scale W x[:GATE_WINDOW]) on each head's output")
    sparse_attn_gate_scale: float = above(1.0, 0, 1000, "scale of SPARSE_ATTN_GATE")
    gate_window: int = whole(12, 1, MOST_WIDTH, "channels that attention's gate and SmearGate read")

    # residual stream
    ln_scale: bool = says(False, "layer l's norms times 1 / sqrt(l + 1)")
    unet_skips: bool = says(True, "outputs of the first half of the layers return in the second")
    skip_gates_enabled: bool = says(False, "a learned gate a channel on each of the UNET_SKIPS")
    num_loops: int = whole(0, 0, MOST_LAYERS, "depth recurrence: so many more passes over some layers; 0: none")
    loop_start: int = whole(0, 0, MOST_LAYERS - 1, "the first layer that is run again")
    loop_end: int = whole(0, 0, MOST_LAYERS - 1, "the last layer that is run again")
    parallel_residual_start: int = whole(
        -1, -1, MOST_LAYERS - 1, "attention and MLP side by side from this layer on; -1: none"
    )
    parallel_start_layer: int = whole(0, 0, MOST_LAYERS - 1, "two lanes from this layer of the second half on; 0: none")
    parallel_final_lane: Literal["mean", "attn", "mlp"] = says("mean", "which of the two lanes reaches the logits")

    # embeddings and logits
    smear_gate_enabled: bool = says(False, "SmearGate: a token takes in something of the one before it")
    smear_gate_bos_fix: bool = says(True, "BOS_ID takes in nothing of the token before it")
    bos_id: int = whole(1, 0, (1 << 16) - 1, "token that begins a document")
    bigram_vocab_size: int = whole(0, 0, 1 << 24, "buckets of the bigram hash embedding; 0: none")
    bigram_dim: int = whole(128, 1, MOST_WIDTH, "width of the bigram hash embedding")
    ve_layers: Text = says("", 'layers with value embeddings, like "9,10"; empty: none')
    ve_dim: int = whole(128, 1, MOST_WIDTH, "width of the value embedding")
    logit_softcap: float = real(30.0, 0.01, 1e4, "logits z become softcap tanh(z / softcap)")
    asym_logit_rescale: bool = says(False, "a cap for each sign, for test-time training")
    tied_embed_init_std: float = real(0.005, 1e-6, 10, "standard deviation of the fresh embedding")

    # training
    seed: int = whole(1337, 0, (1 << 63) - 1, "of weights and of the order of the data")
    iterations: int = whole(20_000, 1, MOST_STEPS, "optimiser steps at most")
    max_wallclock_seconds: float = above(600.0, 0, MOST_SECONDS, "seconds of training, calibration included")
    max_eval_seconds: float = above(600.0, 0, MOST_SECONDS, "seconds that scoring the artifact should take at most")
    train_batch_tokens: int = whole(524_288, 1, MOST_TOKENS, "tokens a step, over all ranks")
    micro_batch_tokens: int = whole(65_536, 1, MOST_TOKENS, "tokens a forward pass, on one rank")
    train_seq_len: int = whole(1024, 1, MOST_LENGTH, "tokens of a training row")
    train_seq_schedule: Text = says(
        "", 'shorter rows at first: "1024@0.1,2048@0.7", each until that fraction of the budget; then TRAIN_SEQ_LEN'
    )
    enable_looping_at: float = real(0.35, 0, 1, "fraction of the budget from which layers are looped")
    warmup_steps: int = whole(20, 0, MOST_STEPS, "untimed steps; weights and optimiser are restored after them")
    warmdown_frac: float = real(0.08, 0, 1, "last part of the budget, in which the learning rate falls")
    min_lr: float = real(0.0, 0, 1, "floor of the falling learning rate, as a fraction of it")
    grad_clip_norm: float = real(0.0, 0, 1e6, "largest norm of all gradients; 0: any")
    ema_decay: float = below(0.0, 0, 1, "of the weights' moving average, a step; 0: none")
    swa_every: int = whole(0, 0, MOST_STEPS, "steps between the weights that are averaged; 0: none")
    swa_start_frac: float = above(0.5, 0, 1, "weights are averaged once the learning rate is this fraction of itself")
    qat: Literal["none", "ste", "soft_round"] = says("none", "training sees banks rounded to MATRIX_BITS")
    late_qat_threshold: float = above(1.0, 0, 1, "QAT once the learning rate is this fraction of itself; 1: at once")
    byte_weighted_loss: bool = says(False, "a token's loss counts by its bytes of text")
    mtp_tokens: int = whole(0, 0, 64, "tokens after the next one that are predicted too")
    mtp_loss_weight: float = real(0.2, 0, 1000, "weight of each of the MTP_TOKENS at the start; 0 at the end")
    abort_step: int = whole(0, 0, MOST_STEPS, "validate after this step; 0: not")
    abort_bpb: float = real(0.0, 0, 1000, "end the run if ABORT_STEP finds more bits per byte than this; 0: never")

    # optimiser
    matrix_lr: float = real(0.04, 0, MOST_RATE, "Muon's learning rate, of the banks of matrices")
    tied_embed_lr: float = real(0.05, 0, MOST_RATE, "Adam's learning rate of the embeddings")
    scalar_lr: float = real(0.04, 0, MOST_RATE, "Adam's learning rate of the small parameters")
    muon_momentum: float = below(0.95, 0, 1, "Muon's momentum")
    muon_momentum_warmup_start: float = below(0.85, 0, 1, "Muon's momentum at the first step")
    muon_momentum_warmup_steps: int = whole(500, 0, MOST_STEPS, "steps until Muon's momentum is MUON_MOMENTUM")
    muon_backend_steps: int = whole(5, 1, 100, "Newton-Schulz steps")
    muon_coefficients: Literal["quintic", "polar_express"] = says("quintic", "polynomials of the Newton-Schulz steps")
    muon_row_normalize: bool = says(False, "MuonEq-R: rows at unit length before the Newton-Schulz steps")
    muon_weight_decay: float = real(0.0, 0, MOST_RATE, "weight decay of the banks, a unit of learning rate")
    muon_beta2: float = below(0.0, 0, 1, "NorMuon's variance reduction; 0: none")
    muon_renormalize: Literal["none", "row", "column", "row_column", "column_row"] = says(
        "none", "Muon+: what is brought to unit length after the Newton-Schulz steps"
    )
    muon_late_layer: int = whole(0, 0, MOST_LAYERS, "Split-LR: MUON_LATE_LR_MULT holds from this layer on")
    muon_late_lr_mult: float = real(1.0, 0, MOST_RATE, "the later layers' banks learn at so many times MATRIX_LR")
    embed_weight_decay: float = real(0.0, 0, MOST_RATE, "weight decay of the embeddings")
    adam_weight_decay: float = real(0.0, 0, MOST_RATE, "weight decay of the small parameters")
    beta1: float = below(0.9, 0, 1, "Adam's decay of the mean gradient")
    beta2: float = below(0.95, 0, 1, "Adam's decay of its mean square")
    adam_eps: float = above(1e-8, 0, 1, "Adam's epsilon")

    # quantisation and artifact
    quantizer: Literal["rtn", "gptq", "gptq_cd", "trellis"] = says("trellis", "how weights are rounded")
    matrix_bits: int = whole(6, 2, 8, "bits of a matrix's weight")
    embed_bits: int = whole(8, 2, 16, "bits of an embedding's weight, 2 to 8; 16: float16, as it is")
    matrix_clip_sigmas: float = real(12.85, 0.1, 1000, "where a row is clipped, in its standard deviations")
    attn_clip_sigmas: float = real(0.0, 0, 1000, "where attention's rows are clipped; 0: MATRIX_CLIP_SIGMAS")
    mlp_clip_sigmas: float = real(0.0, 0, 1000, "where the MLPs' rows are clipped; 0: MATRIX_CLIP_SIGMAS")
    embed_clip_sigmas: float = real(20.0, 0.1, 1000, "where the embeddings' rows are clipped")
    attn_bits: int = whole(0, 0, 8, "bits of attention's weights; 0: MATRIX_BITS")
    mlp_bits: int = whole(0, 0, 8, "bits of the MLPs' weights; 0: MATRIX_BITS")
    lqer_rank: int = whole(0, 0, MOST_WIDTH, "rank of the low-rank corrections (LQER); 0: none")
    lqer_top_k: int = whole(3, 1, 10_000, "matrices that get a low-rank correction, the worst first")
    lqer_factor_bits: int = whole(4, 2, 8, "bits of a correction's weight")
    gptq_damping: float = above(0.01, 0, 1, "added to a Hessian's diagonal, in units of its mean")
    gptq_calibration_batches: int = whole(16, 1, 1_000_000, "batches of TRAIN_BATCH_TOKENS that Hessians are made of")
    gptq_reserve_seconds: float = real(8.0, 0, MOST_SECONDS, "seconds kept back from training for calibration")
    budget_bytes: int = whole(16_000_000, 1, MOST_BYTES, "bytes that code and artifact may have together")
    artifact_bytes: int = whole(
        0, 0, MOST_BYTES, "steps are chosen to fill these bytes; 0: *_CLIP_SIGMAS, larger if over budget"
    )
    artifact_coder: Literal["mix", "static"] = says("mix", "the artifact's entropy coder: small, or fast")

    # evaluation with a causal n-gram cache, besides the model alone
    ngram: Literal["off", "adaptive", "dirichlet", "pyp", "tilt"] = says(
        "off", "score with a causal n-gram cache too, mixed so"
    )
    ngram_order: int = whole(0, 0, 16, "highest order; 0: 7, of tilt 16")
    ngram_memory_bytes: int = whole(1 << 30, 1 << 22, 1 << 36, "bytes of the cache at most; a short split takes less")
    ngram_threshold: float = above(0.8, 0, 1, "of tilt: a hint came true in this share of its cases, or no tilt")
    ngram_boost: float = real(2.625, -50, 50, "of tilt: what it adds to the hint's logit, in nats")

    # scoring
    eval_seq_len: int = whole(0, 0, MOST_LENGTH, "tokens of context at most; 0: TRAIN_SEQ_LEN")
    eval_stride: int = whole(
        0, 0, MOST_LENGTH, "tokens scored by each further window; 0: EVAL_SEQ_LEN, without overlap"
    )
    eval_documents: bool = says(False, "each document alone, from its beginning")

    # logging and machine
    val_loss_every: int = whole(1000, 0, MOST_STEPS, "steps between validations; 0: only at the end")
    val_batch_size: int = whole(65_536, 1, MOST_TOKENS, "tokens a forward pass of scoring, on one rank")
    train_log_every: int = whole(200, 0, MOST_STEPS, "steps between lines of the log")
    device: Literal["auto", "cpu", "cuda"] = says("auto", "auto: a GPU where there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = says("auto", "of the forward pass; auto: what is fast here")
    attention: Literal["auto", "flash3", "flash4", "varlen", "sdpa", "plain"] = says(
        "auto", "how attention is computed"
    )
    fused_glue: Switch = says("auto", "fused operations between matrix products: pgolf/model/execution.py")
    compile: Switch = says("auto", "torch.compile; auto: on where there is a GPU")
    cuda_graphs: Switch = says("auto", "replay forward and backward: pgolf/training/cuda_graphs.py")
    checkpoint_minutes: float = real(1.0, 0, 10_000, "of training between two checkpoints; 0: only one at the end")
    process_timeout_seconds: float = above(
        300.0, 0, MOST_SECONDS, "seconds to wait for another process, longer than it compiles"
    )

    @model_validator(mode="after")
    def _go_together(self) -> "Settings":
        for problem in setting_rules.problems(self):
            raise ValueError(problem)
        return self

    @property
    def train_seq_stages(self) -> list[tuple[float, int]]:
        """(fraction of the budget where it ends, sequence length) of each stage of training; the last ends at 1."""
        return setting_rules.stages(self.train_seq_schedule, self.train_seq_len)

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


NAMES = frozenset(name.upper() for name in Settings.model_fields)  # of the variables


def load_settings(environ: Mapping[str, str] | None = None, preset: str | None = None, cuda: bool = False) -> Settings:
    """The settings of a run, from a preset and from variables of the fields' upper-case names.

    Args:
        environ: {"PRESET": name, "MODEL_DIM": "384", ...}, other variables are left alone; None: the environment.
        preset: where environ names none; None: the best system whose data is there with `cuda`, else "demo".
        cuda: whether there is a GPU, for that choice.
    Returns:
        `Settings`, frozen; `run_id` is empty where none is given: a run makes it when it takes its folder.
    Raises:
        UserError: one line for whatever cannot be used: a wrong value, an unknown preset, settings that contradict each
            other, a variable one slip away from a field's name, an entry's setting that has no counterpart here.
    Example:
        >>> from pgolf.settings import load_settings
        >>> settings = load_settings({"PRESET": "demo", "SEED": "42", "NUM_LAYERS": "2"})
        >>> settings.preset, settings.seed, settings.num_layers
        ('demo', 42, 2)

    Source: presets name their entries of the challenge in pgolf/presets.py.
    """
    given = given_settings(os.environ if environ is None else environ)
    preset = given.pop("preset", None) or preset or default_preset(cuda)
    if preset not in PRESETS:
        raise UserError(f"PRESET={one_line(preset, 80)}: no such preset; accepted are {', '.join(sorted(PRESETS))}")
    return validate({"preset": preset, **PRESETS[preset], **given})


def given_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What the variables in `environ` set, by field; what they say in other names is told, or refused."""
    values, notes = in_our_names(environ, NAMES)
    tell(notes)
    return {name.lower(): value.strip() for name, value in values.items()}


def settings_of_arguments(argv: Iterable[str], environ: MutableMapping[str, str]) -> None:
    """Put arguments NAME=value into `environ`, where they take the place of variables of the same meaning."""
    given: dict[str, str] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise UserError(f"{one_line(argument, 80)}: not an argument; accepted are NAME=value and --help")
        if name in given:
            raise UserError(f"{one_line(name, 80)}: given twice")
        given[name] = value
    in_our_names(given, NAMES, foreign=False)
    for name in given:
        for other in same_meaning(name):
            environ.pop(other, None)
    environ.update(given)


def validate(values: dict[str, Any]) -> Settings:
    """Build `Settings`, turning the first thing that is wrong into one line."""
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule between several fields; its message names them
            raise UserError(str(first["ctx"]["error"]) if "ctx" in first else "a name that is no text") from None
        name = str(first["loc"][0])
        if name not in Settings.model_fields:
            raise UserError(f"{one_line(name, 80)}: no such setting") from None
        if first["type"].startswith(("greater_than", "less_than", "int_parsing_size")):
            message = f"must be {accepted(name)}"
        elif first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        else:
            message = f"must be {first['msg'].removeprefix('Input should be ')}"
        raise UserError(f"{name.upper()}={one_line(first['input'], 80)}: {message}") from None


def accepted(name: str) -> str:
    """What a setting takes, in words."""
    field = Settings.model_fields[name]
    if choices := get_args(field.annotation):
        return ", ".join(map(str, choices))
    if field.annotation in (bool, str):
        return {bool: "0 or 1", str: "text"}[field.annotation]
    kinds = ("ge", "gt", "le", "lt")
    bounds = {kind: getattr(each, kind) for each in field.metadata for kind in kinds if hasattr(each, kind)}
    shown = {kind: str(int(bound)) if bound == int(bound) else f"{bound:g}" for kind, bound in bounds.items()}
    if "gt" in shown:
        return f"more than {shown['gt']}, at most {shown['le']}"
    return f"{shown['ge']} to less than {shown['lt']}" if "lt" in shown else f"{shown['ge']} to {shown['le']}"
