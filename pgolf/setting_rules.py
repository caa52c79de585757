"""The rules between settings: which values, each good by itself, cannot go together.

Each is looked at in turn, so that one may rely on those before it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_LAYERS = 1000  # that a forward pass runs through
MOST_WEIGHTS = 1 << 34  # of all matrices and tables together


def problems(s: Any) -> Iterator[str]:
    """What is wrong with the settings `s`, a line each; whoever asks for the second may meet an exception."""
    yield from _of_shapes(s)
    yield from _of_techniques(s)
    yield from _of_batches(s)
    yield from _of_training(s)
    yield from _of_the_artifact(s)
    if s.run_id != Path(s.run_id).name or s.run_id in (".", ".."):
        yield f"RUN_ID={s.run_id!r} must be a plain file name"


def _of_shapes(s: Any) -> Iterator[str]:
    head_dim, rest = divmod(s.model_dim, s.num_heads)
    if rest:
        yield f"MODEL_DIM={s.model_dim} must be a multiple of NUM_HEADS={s.num_heads}"
    if head_dim % 2:
        yield f"MODEL_DIM / NUM_HEADS = {head_dim} must be even, for rotary embeddings"
    if s.num_heads % s.num_kv_heads:
        yield f"NUM_HEADS={s.num_heads} must be a multiple of NUM_KV_HEADS={s.num_kv_heads}"
    if s.rope_dims % 2 or s.rope_dims > head_dim:
        yield f"ROPE_DIMS={s.rope_dims} must be even and at most MODEL_DIM / NUM_HEADS = {head_dim}"
    hidden = s.mlp_mult * s.model_dim
    if hidden != int(hidden):
        yield f"MLP_MULT={s.mlp_mult:g} x MODEL_DIM={s.model_dim} must be a whole number"
    kv_dim = s.num_kv_heads * head_dim
    weights = s.num_layers * s.model_dim * (2 * s.model_dim + 2 * kv_dim + 2 * int(hidden)) + s.vocab_size * s.model_dim
    weights += (s.bigram_vocab_size + s.model_dim) * s.bigram_dim if s.bigram_vocab_size else 0
    weights += (s.vocab_size + kv_dim) * s.ve_dim if s.ve_layers else 0
    if weights > MOST_WEIGHTS:
        of_what = f"NUM_LAYERS={s.num_layers}, MODEL_DIM={s.model_dim}, VOCAB_SIZE={s.vocab_size}"
        yield f"{of_what}: {weights} weights; at most {MOST_WEIGHTS} are accepted"


def _of_techniques(s: Any) -> Iterator[str]:
    layers = s.num_layers
    if s.num_loops:
        if not s.loop_start <= s.loop_end < layers:
            yield f"LOOP_START={s.loop_start}, LOOP_END={s.loop_end}: must be 0 to {layers - 1}, in order"
        virtual = layers + s.num_loops * (s.loop_end - s.loop_start + 1)
        if virtual > MOST_LAYERS:
            yield f"NUM_LOOPS={s.num_loops}: {virtual} layers would run, {MOST_LAYERS} may"
    if s.parallel_start_layer and s.parallel_residual_start >= 0:
        yield (
            f"PARALLEL_START_LAYER={s.parallel_start_layer} and PARALLEL_RESIDUAL_START={s.parallel_residual_start}: "
            "only one form of parallel residuals at once"
        )
    first = s.loop_end + 1 if s.num_loops else 1
    if s.parallel_start_layer and not first <= s.parallel_start_layer < layers:
        yield (
            f"PARALLEL_START_LAYER={s.parallel_start_layer}: must be 0, or after the loop and a layer: {first} to "
            f"NUM_LAYERS - 1 = {layers - 1}"
        )
    if s.attn_out_gate_enabled and s.sparse_attn_gate_enabled:
        yield "ATTN_OUT_GATE_ENABLED=1 and SPARSE_ATTN_GATE_ENABLED=1: attention has one gate at most"
    if s.gate_window > s.model_dim:
        yield f"GATE_WINDOW={s.gate_window} is more than MODEL_DIM"
    if s.bos_id >= s.vocab_size:
        yield f"BOS_ID={s.bos_id} must be a token, less than VOCAB_SIZE={s.vocab_size}"
    if s.bigram_vocab_size == 1:
        yield "BIGRAM_VOCAB_SIZE=1: must be 0 or at least 2"
    names = [name.strip() for name in s.ve_layers.split(",") if name.strip()]
    numbers = {int(name) for name in names if name.isdecimal() and len(name) <= 4}
    if len(numbers) < len(names) or not all(number < layers for number in numbers):
        yield f"VE_LAYERS={s.ve_layers!r}: must be different layers below NUM_LAYERS={layers}, like 1,2"


def _of_batches(s: Any) -> Iterator[str]:
    for name in ("train_batch_tokens", "micro_batch_tokens"):
        if getattr(s, name) % s.train_seq_len:
            yield f"{name.upper()}={getattr(s, name)} must be a multiple of TRAIN_SEQ_LEN={s.train_seq_len}"
    for _, length in stages(s.train_seq_schedule, s.train_seq_len):
        if length > s.train_seq_len or (s.loader != "documents" and s.train_seq_len % length):
            yield (
                f"TRAIN_SEQ_SCHEDULE={s.train_seq_schedule}: {length} must divide TRAIN_SEQ_LEN={s.train_seq_len}"
                " (LOADER=documents takes any length up to it)"
            )
    context = s.scoring["seq_len"]
    if s.eval_stride > context:
        yield f"EVAL_STRIDE={s.eval_stride} must be at most EVAL_SEQ_LEN={context}, or tokens would be left out"


def _of_training(s: Any) -> Iterator[str]:
    if s.gptq_reserve_seconds >= s.max_wallclock_seconds:
        yield (
            f"MAX_WALLCLOCK_SECONDS={s.max_wallclock_seconds:g} leaves no time to train: "
            f"GPTQ_RESERVE_SECONDS={s.gptq_reserve_seconds:g} of it are kept for calibration"
        )
    for name, chosen in (("late_qat_threshold", s.qat != "none"), ("swa_start_frac", s.swa_every > 0)):
        threshold = getattr(s, name)
        if chosen and threshold != 1 and not (s.warmdown_frac > 0 and threshold >= s.min_lr):
            yield (
                f"{name.upper()}={threshold:g} is never reached: with WARMDOWN_FRAC={s.warmdown_frac:g} and "
                f"MIN_LR={s.min_lr:g} the learning rate stays above it"
            )
    if s.ema_decay and s.swa_every:
        yield f"EMA_DECAY={s.ema_decay:g} and SWA_EVERY={s.swa_every}: only one of the two can become the weights"
    if s.abort_bpb and not s.abort_step:
        yield f"ABORT_BPB={s.abort_bpb:g} needs ABORT_STEP, the step after which it is looked at"
    if s.abort_step and "abort_bpb" not in s.model_fields_set:
        yield f"ABORT_STEP={s.abort_step} needs ABORT_BPB, the bits per byte above which the run ends; 0 only validates"


def _of_the_artifact(s: Any) -> Iterator[str]:
    if 8 < s.embed_bits < 16:
        yield f"EMBED_BITS={s.embed_bits}: must be 2 to 8, or 16"
    for name in ("attn_bits", "mlp_bits"):
        if getattr(s, name) == 1:
            yield f"{name.upper()}=1 must be 2 to 8, or 0 for MATRIX_BITS"
    if s.ngram_order == 1:
        yield "NGRAM_ORDER=1 must be 2 to 16, or 0"


def stages(schedule: str, seq_len: int) -> list[tuple[float, int]]:
    """TRAIN_SEQ_SCHEDULE taken apart: (fraction of the budget where it ends, length) of each; the last ends at 1."""
    found: list[tuple[float, int]] = []
    for stage in filter(None, schedule.replace(" ", "").split(",")):
        length, _, end = stage.partition("@")
        try:
            found.append((float(end), int(length)))
        except ValueError:
            found.append((math.nan, 0))
        before, (last, tokens) = found[-2][0] if len(found) > 1 else 0.0, found[-1]
        if not (before < last <= 1 and tokens > 0):
            raise ValueError(
                f"TRAIN_SEQ_SCHEDULE={schedule}: {stage!r} must be LENGTH@FRACTION, each fraction "
                "of the budget larger than the one before and at most 1"
            )
    if not found or found[-1][0] < 1:
        found.append((1.0, seq_len))
    return found
