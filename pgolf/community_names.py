"""Names of settings that people bring along: the entries' own, common abbreviations, and slips.

An entry's name that means exactly what one of ours means is taken as ours, and told. One that does not is refused with
the reason, unless its value asks for what is done here anyway. A name one slip away from one of ours is refused too.
What looks like a setting and is none of these is warned of; all other variables are somebody else's.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache

from pgolf.errors import UserError, one_line


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRANSLATED = {  # theirs: ours
    "ADAM_WD": "ADAM_WEIGHT_DECAY",
    "EMBED_WD": "EMBED_WEIGHT_DECAY",
    "MUON_WD": "MUON_WEIGHT_DECAY",
    "TOKEN_BOOST": "NGRAM_BOOST",
    "TOKEN_ORDER": "NGRAM_ORDER",
    "TOKEN_THRESHOLD": "NGRAM_THRESHOLD",
}
OFF = ("0", "0.0", "false", "")
ON = ("1", "true")
ALWAYS = {  # theirs: the values that ask for what is done here anyway
    "TIE_EMBEDDINGS": ON,
    "FUSED_CE_ENABLED": ON,
    "VAL_DOC_FRACTION": ("1", "1.0"),
    "QK_GAIN_SCHEDULE": ("", "[]"),
    **dict.fromkeys(
        words(
            "AGREE_ADD_BOOST ETLB_ENABLED GATED_ATTN_ENABLED MLP_HIDDEN MUON_HUBER_WD NGRAM_HINT_PRECOMPUTE_OUTSIDE "
            "OPTROT_ENABLED PHASED_TTT_ENABLED ROPE_YARN SPARSE_ATTN_GATE_INIT_STD TTT_ENABLED WITHIN_BOOST WORD_BOOST"
        ),
        OFF,
    ),
}
NO_TTT = "there is no test-time training here"
NO_ETLB = "logits are not biased while scoring here: it is not accepted"
ONE_HINT = "the tilt has its token expert alone here, the one that is accepted"
DATA = "give DATA_PATH, the folder of the shards, and TOKENIZER_PATH"
GATES = "the gates here are ATTN_OUT_GATE_ENABLED and SPARSE_ATTN_GATE_ENABLED"
REFUSED = {  # theirs, or how theirs begin when it ends in _: why
    "AGREE_ADD_BOOST": ONE_HINT,
    "ARTIFACT_DIR": "give OUT_DIR and RUN_ID",
    "CASEOPS_ENABLED": "the shards decide: give PRESET=record or pr1855, or DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE",
    "COMPRESSOR": "the artifact has a coder of its own: give ARTIFACT_CODER=mix or static",
    "DATASETS_DIR": DATA,
    "DATA_DIR": DATA,
    "EMA_ENABLED": "give EMA_DECAY, 0 for none",
    "EMBEDDING_DIM": "the embedding is as wide as MODEL_DIM",
    "EMBED_LR": "the embedding is tied: give TIED_EMBED_LR",
    "ETLB_": NO_ETLB,
    "EVAL_BATCH_SEQS": "give VAL_BATCH_SIZE, in tokens on one rank",
    "FUSED_CE_ENABLED": "the loss is always fused; PGOLF_BACKEND=reference runs every operation in plain PyTorch",
    "GATED_ATTN_": GATES,
    "GLOBAL_TTT_": NO_TTT,
    "GRAD_ACCUM_STEPS": "give MICRO_BATCH_TOKENS, the tokens of a forward pass on one rank",
    "HEAD_LR": "the head is the tied embedding: give TIED_EMBED_LR",
    "ITERS": "did you mean ITERATIONS?",
    "LATE_QAT": "give QAT and LATE_QAT_THRESHOLD",
    "LQER_ASYM_": "the corrections' factors are symmetric, of LQER_FACTOR_BITS",
    "LQER_ENABLED": "give LQER_RANK, 0 for none",
    "LR": "give MATRIX_LR, TIED_EMBED_LR and SCALAR_LR",
    "MAX_WALLCLOCK": "did you mean MAX_WALLCLOCK_SECONDS?",
    "MLP_HIDDEN": "give MLP_MULT, the hidden width over MODEL_DIM",
    "MTP_NUM_HEADS": "give MTP_TOKENS; the tokens ahead are predicted by the one head",
    "MUON_HUBER_": "Muon's weight decay is the plain one here, MUON_WEIGHT_DECAY",
    "NGRAM_HINT_PRECOMPUTE_OUTSIDE": "hints are made inside the time of the evaluation",
    "NGRAM_TILT_ENABLED": "give NGRAM=tilt or NGRAM=off",
    "OPTROT_ENABLED": "matrices are not rotated before they are rounded here",
    "PHASED_TTT_": NO_TTT,
    "QAT_ENABLED": "give QAT=ste or soft_round, and LATE_QAT_THRESHOLD",
    "QK_GAIN_SCHEDULE": "all layers begin with QK_GAIN_INIT",
    "QUANTIZED_MODEL_PATH": "give OUT_DIR and RUN_ID; the artifact is model.pgolf in that folder",
    "ROPE_YARN": "give ROPE_SCALING=yarn, ntk or none",
    "SLIDING_WINDOW_ENABLED": "give EVAL_STRIDE, 0 for windows without overlap",
    "SPARSE_ATTN_GATE_INIT_STD": "gates begin at 0",
    "SWA_ENABLED": "give SWA_EVERY, 0 for none",
    "TIE_EMBEDDINGS": "the head is always the embedding",
    "TRAIN_FILES": DATA,
    "TTT_": NO_TTT,
    "VAL_BATCH_TOKENS": "give VAL_BATCH_SIZE, which counts the tokens of one rank alone",
    "VAL_BYTES_FILES": DATA,
    "VAL_DOC_FRACTION": "the whole validation split is scored",
    "VAL_FILES": DATA,
    "VE_ENABLED": "give VE_LAYERS, empty for none",
    "WARMDOWN_ITERS": "give WARMDOWN_FRAC, the fraction of the budget in which the learning rate falls",
    "WITHIN_": ONE_HINT,
    "WORD_BOOST": ONE_HINT,
    "WORD_NORMALIZE": ONE_HINT,
    "WORD_ORDER": ONE_HINT,
    "WORD_TAU": ONE_HINT,
}
# Refused as an argument; a variable of such a common name may be somebody else's, and is warned of.
COMMON = ("ARTIFACT_DIR", "COMPRESSOR", "DATA_DIR")
# In the entries' lists of hyperparameters, but set by the launcher or worked out: as variables they are anybody's.
NOT_SETTINGS = ("DISTRIBUTED", "IS_MAIN_PROCESS", "LOCAL_RANK", "LOGFILE", "MODEL_PATH", "RANK", "WORLD_SIZE")

# Whole parts of a name that make it look like a setting of a training script,
VOCABULARY = words(
    "ADAM ADAMW BATCH BIGRAM BPB CALIBRATION CLIP DECAY EMA EMBED EMBEDDINGS EPOCHS GPTQ ITERATIONS ITERS LAYERS LOGIT "
    "LOOPS LORA LQER LR MLP MOMENTUM MTP MUON NGRAM QAT QK QUANT QUANTIZER ROPE SEQ SMEAR SOFTCAP SWA TTT VE VOCAB "
    "WALLCLOCK WARMDOWN WARMUP WD XSA"
)
# and first parts of a name that say whose it is instead.
FOREIGN = words(
    "ACCELERATE AMD ANTHROPIC ATEN AWS AZURE BASH BUILDKITE CARGO CI CIRCLE CLAUDE CMAKE CODEX CONDA CUBLAS CUDA CUDNN "
    "DEEPSPEED DNNL DOCKER FLASH GCP GIT GITHUB GITLAB GLOO GOMP GOOGLE HF HIP HUGGINGFACE JAX JENKINS JOB JUPYTER K8S "
    "KMP KUBERNETES LC LD LLM LSB LSF MIOPEN MKL MLFLOW MPI NCCL NUMBA NV NVIDIA NVTE OMP OMPI ONEDNN OPENAI OPENBLAS "
    "PBS PGOLF PIP PMI PMIX PYTEST PYTHON PYTORCH RAY ROCM RUNPOD SAGEMAKER SBATCH SGE SINGULARITY SLURM SRUN SSH TF "
    "TOKENIZERS TORCH TORCHELASTIC TORCHINDUCTOR TRANSFORMERS TRITON UCX UV VIRTUAL VLLM VSCODE WANDB XDG XLA ZSH"
)
_told: set[str] = set()


def in_our_names(
    environ: Mapping[str, str], ours: frozenset[str], foreign: bool = True
) -> tuple[dict[str, str], list[str]]:
    """The variables that are settings, by our names, and what there is to tell; `UserError` for what cannot be used.

    Without `foreign` none may be anything but a setting.
    """
    values = {name: value for name, value in environ.items() if name in ours}
    taken, unused, unknown, refused = [], [], [], {}
    for name, value in environ.items():
        if name in ours or (foreign and name in NOT_SETTINGS):
            continue
        if name in TRANSLATED:
            other = values.setdefault(TRANSLATED[name], value)
            if other != value:
                raise UserError(
                    f"{name}={one_line(value, 80)} and {TRANSLATED[name]}={one_line(other, 80)}: two values of one "
                    "setting; give the second alone"
                )
            taken.append(f"{name} as {TRANSLATED[name]}")
        elif value.strip().lower() in ALWAYS.get(name, ()):
            unused.append(f"{name}={value.strip()}")
        elif foreign and name in COMMON:
            unknown.append(name)
        elif reason := reason_to_refuse(name):
            refused[name] = f"{name}={one_line(value, 80)}: {reason}"
        elif near := _near(name, ours):
            raise UserError(f"{one_line(name, 80)}={one_line(value, 80)}: no such setting; did you mean {near}?")
        elif not foreign:
            raise UserError(f"{one_line(name, 80)}={one_line(value, 80)}: no such setting; `pgolf settings` lists them")
        elif looks_like_a_setting(name):
            unknown.append(name)
    if refused:
        (name, message), *others = refused.items()
        raise UserError(message + (f" (nor can {', '.join(other for other, _ in others)} be used)" if others else ""))
    notes = [f"taken: {', '.join(sorted(taken))}"] if taken else []
    notes += [f"always so here: {', '.join(sorted(unused))}"] if unused else []
    if unknown:
        notes.append(f"no settings, and not looked at: {', '.join(sorted(unknown))} (`pgolf settings` lists all)")
    return values, notes


def same_meaning(name: str) -> list[str]:
    """All names of the setting that has this one."""
    ours = TRANSLATED.get(name, name)
    return [ours, *(other for other, translated in TRANSLATED.items() if translated == ours)]


def tell(notes: Iterable[str]) -> None:
    """Print each note on the standard error output, once, by one process of a machine."""
    for note in notes:
        if note not in _told and os.environ.get("LOCAL_RANK", "0") == "0":
            _told.add(note)
            print(one_line(f"settings: {note}"), file=sys.stderr)


def reason_to_refuse(name: str) -> str | None:
    """Why an entry's name is not taken here; None if it is not known."""
    begins = (reason for prefix, reason in REFUSED.items() if prefix.endswith("_") and name.startswith(prefix))
    return REFUSED.get(name) or next(begins, None)


def looks_like_a_setting(name: str) -> bool:
    parts = name.split("_")
    return name.isupper() and parts[0] not in FOREIGN and not VOCABULARY.isdisjoint(parts)


@lru_cache(maxsize=1024)
def _near(variable: str, ours: frozenset[str]) -> str | None:
    """The one of our names that `variable` is a slip away from."""
    given = variable.upper()
    for name in ours:
        allowed = 0 if len(name) < 4 else 1 if len(name) < 10 else 2
        if len({*given} ^ {*name}) <= 2 * allowed and _edit_distance(given, name, allowed) <= allowed:
            return name
    return None


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
