"""Named settings: one preset for each system that this package grew from. A preset lists what differs from the
defaults of `Settings`, which are the challenge's naive baseline.

The numbers of #1493, #1855 and #2135 are the hyperparameter dumps at the head of their train logs; those of #66 and
#1218 are the defaults of their scripts, which their runs did not change.
"""

from pathlib import Path
from typing import Any

DEMO_DATA_PATH = "data/datasets/demo_sp1024"
DEMO_TOKENIZER_PATH = "data/tokenizers/demo_1024_bpe.model"
DEMO_VOCAB_SIZE = 1024
DEFAULT_TRAIN_SHARDS = 80  # of the challenge's FineWeb sample, as its own downloader fetches
# Of an artifact that shall fill the budget of 16,000,000 bytes: all of this package's code counts, packed, which takes
# about 186 kB now; the rest is for what it may grow by.
FILLED_BYTES = 15_800_000
# The community's layout, which `pgolf data download` makes.
FINEWEB = {
    "sp1024": "data/datasets/fineweb10B_sp1024",
    "sp4096": "data/datasets/fineweb10B_sp4096",
    "sp8192": "data/datasets/fineweb10B_sp8192",
    "caseops": "data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
}
FINEWEB_TOKENIZER = {
    "sp1024": "data/tokenizers/fineweb_1024_bpe.model",
    "sp4096": "data/tokenizers/fineweb_4096_bpe.model",
    "sp8192": "data/tokenizers/fineweb_8192_bpe.model",
    "caseops": "data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
}


def _fineweb(variant: str, vocab_size: int) -> dict[str, Any]:
    return {"data_path": FINEWEB[variant], "tokenizer_path": FINEWEB_TOKENIZER[variant], "vocab_size": vocab_size}


PR66: dict[str, Any] = {
    "mlp_mult": 3.0,
    "train_batch_tokens": 393_216,
    "micro_batch_tokens": 49_152,  # a rank's share
    "train_seq_len": 4096,
    "rope_train_seq_len": 4096,
    "warmdown_frac": 0.32,  # WARMDOWN_ITERS=3000 at 64.3 ms are 193 s of 600
    "matrix_lr": 0.02,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "qat": "ste",  # from the first step, by #65
    "quantizer": "rtn",
    "embed_bits": 16,
    "gptq_reserve_seconds": 0.0,
    "gptq_calibration_batches": 1,  # rounding to nearest does not look at them
    "eval_stride": 64,
}

DENSE4096: dict[str, Any] = {
    **_fineweb("sp4096", 4096),
    "num_layers": 11,
    "mlp_mult": 4.0,
    "mlp_slope": 0.5,
    "rope_dims": 16,
    "rope_scaling": "ntk",
    "rope_train_seq_len": 2048,
    "qk_gain_init": 4.0,
    "xsa_last_n": 11,
    "ln_scale": True,
    "skip_gates_enabled": True,
    "ve_layers": "9,10",
    "ve_dim": 128,
    "train_batch_tokens": 786_432,
    "micro_batch_tokens": 98_304,  # a rank's share
    "train_seq_len": 2048,
    "loader": "coprime",
    "warmdown_frac": 0.667,
    "grad_clip_norm": 0.3,
    "ema_decay": 0.997,
    "matrix_lr": 0.02,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_weight_decay": 0.085,
    "embed_weight_decay": 0.085,
    "adam_weight_decay": 0.02,
    "gptq_calibration_batches": 64,
    "gptq_reserve_seconds": 10.0,
    "eval_stride": 64,
    "val_loss_every": 4000,
    "val_batch_size": 524_288,
    "train_log_every": 500,
}

# What the write-up does not say is as in #1218; it publishes no count.
RECURRENT8: dict[str, Any] = {
    **DENSE4096,
    "num_layers": 8,
    "mlp_mult": 3.0,
    "xsa_last_n": 8,
    "ve_layers": "",
    "num_loops": 7,
    "loop_start": 2,
    "loop_end": 4,
}

PR1493: dict[str, Any] = {
    **DENSE4096,
    **_fineweb("sp8192", 8192),
    "ve_layers": "",
    "qk_gain_init": 5.25,
    "num_loops": 2,
    "loop_start": 3,
    "loop_end": 5,
    "enable_looping_at": 0.35,
    "parallel_residual_start": 7,
    "loader": "shuffled",
    "warmdown_frac": 0.72,
    "ema_decay": 0.9965,
    "matrix_lr": 0.022,
    "muon_row_normalize": True,
    "muon_weight_decay": 0.095,
    "quantizer": "gptq",
    "artifact_bytes": FILLED_BYTES,
    "gptq_reserve_seconds": 12.0,
}

PR1855: dict[str, Any] = {
    **PR1493,
    **_fineweb("caseops", 8192),
    "rope_scaling": "none",
    "qk_gain_init": 5.0,
    "parallel_residual_start": -1,
    "parallel_start_layer": 8,
    "sparse_attn_gate_enabled": True,
    "sparse_attn_gate_scale": 0.5,
    "smear_gate_enabled": True,
    "loader": "documents",
    "warmdown_frac": 0.85,
    "min_lr": 0.1,
    "matrix_lr": 0.026,
    "muon_momentum": 0.97,
    "muon_coefficients": "polar_express",  # #1787
    "beta2": 0.99,
    "embed_bits": 7,
    "attn_clip_sigmas": 13.0,
    "mlp_clip_sigmas": 11.5,
    "embed_clip_sigmas": 14.0,
    "lqer_rank": 4,
    "lqer_top_k": 3,
    "gptq_calibration_batches": 16,
    "gptq_reserve_seconds": 8.0,  # #1855 kept 0.5 s and calibrated past the end; #1868 measured no loss with 8 s
    "eval_stride": 0,
    "eval_documents": True,
    "val_loss_every": 0,
}

# SMEAR_GATE_BOS_FIX is on here; #2135's command switched it off, though its README calls the gate fixed.
RECORD: dict[str, Any] = {
    **PR1855,
    "asym_logit_rescale": True,  # #1923
    "matrix_lr": 0.028,
    "quantizer": "trellis",  # ours; for equal bytes it loses less than GPTQ
    "lqer_rank": 0,
    "gptq_calibration_batches": 32,
    "eval_seq_len": 2560,
    "val_loss_every": 4000,
}

DEMO: dict[str, Any] = {
    "data_path": DEMO_DATA_PATH,
    "tokenizer_path": DEMO_TOKENIZER_PATH,
    "num_layers": 3,
    "model_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 3.0,
    "mlp_slope": 0.5,
    "qk_gain_init": 4.0,
    "xsa_last_n": 3,
    "smear_gate_enabled": True,
    "parallel_start_layer": 1,
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
    "ngram": "adaptive",
    "val_loss_every": 0,
    "val_batch_size": 8192,
    "train_log_every": 10,
}

PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "demo": DEMO,
    "pr66": PR66,
    "dense4096": DENSE4096,
    "recurrent8": RECURRENT8,
    "pr1493": PR1493,
    "pr1855": PR1855,
    "record": RECORD,
}

SYSTEMS = {  # bpb, parameters and steps as published
    "baseline": "the challenge's naive baseline: 1.2244 bpb, 17,059,912 parameters, 13,780 steps of 43.5 ms",
    "demo": "small enough for two CPU cores, on text that every Python installation carries",
    "pr66": "#66 at 3d1780d8: 1.16323 bpb, 21,778,504 parameters, 9,326 steps of 64.3 ms",
    "dense4096": "#1218: 1.0979 bpb, 34,401,371 parameters; every later entry's shape, without loops",
    "recurrent8": "the depth-recurrent write-up: 8 layers, 2 to 4 run eight times; 21,002,304 parameters here",
    "pr1493": "#1493, seed 42: 1.0810 bpb, 35,944,536 parameters, 4,550 steps of 129.2 ms",
    "pr1855": "#1855, seed 42: 1.06108 bpb, 35,945,671 parameters, 4,931 steps of 121.7 ms",
    "record": "#2135, seed 42: 1.05651 bpb, the best listed, 35,945,673 parameters, 4,994 steps of 120.1 ms",
}


def how_to_get(data_path: str) -> str:
    """What to do where the folder `data_path` has no shards."""
    for variant, folder in FINEWEB.items():
        if Path(data_path).name == Path(folder).name:
            size = f"{DEFAULT_TRAIN_SHARDS} training shards of 200 MB"
            return f"`pgolf data download --variant {variant}` fetches {size}; fewer with --train-shards"
    return "`pgolf data --help` tells how to get data"


def default_preset(cuda: bool) -> str:
    """With a GPU, the best system whose data is at hand; else `demo`."""
    with_data = {"record": "caseops", "pr1493": "sp8192", "dense4096": "sp4096", "baseline": "sp1024"}
    for preset, variant in with_data.items():
        if cuda and any(Path(FINEWEB[variant]).glob("*_train_*.bin")):
            return preset
    return "demo"
