"""Names that people bring along from the entries: known, taken as ours, or refused with the reason; never ignored."""

import pytest

from pgolf.community_names import (
    ALWAYS,
    NOT_SETTINGS,
    REFUSED,
    TRANSLATED,
    in_our_names,
    looks_like_a_setting,
    reason_to_refuse,
    tell,
)
from pgolf.errors import UserError
from pgolf.settings import NAMES, load_settings

# The hyperparameters at the head of the train logs of #66, #1493, #1855 and #2135 of the challenge.
DUMPS = """
adam_eps adam_wd agree_add_boost artifact_dir asym_logit_rescale attn_clip_sigmas attn_out_gate_enabled
attn_out_gate_src beta1 beta2 caseops_enabled compressor data_dir data_path datasets_dir distributed ema_decay
embed_bits embed_clip_sigmas embed_lr embed_wd embedding_dim enable_looping_at etlb_clip etlb_enabled etlb_lr etlb_steps
eval_batch_seqs eval_seq_len eval_stride fused_ce_enabled gate_window gated_attn_enabled gated_attn_init_std
gated_attn_quant_gate global_ttt_batch_seqs global_ttt_chunk_tokens global_ttt_epochs global_ttt_grad_clip global_ttt_lr
global_ttt_momentum global_ttt_muon_nesterov global_ttt_muon_ns_steps global_ttt_optimizer
global_ttt_respect_doc_boundaries global_ttt_warmup_chunks global_ttt_warmup_start_lr gptq_calibration_batches
gptq_reserve_seconds grad_accum_steps grad_clip_norm head_lr is_main_process iterations ln_scale local_rank logfile
logit_softcap loop_end loop_start lqer_asym_enabled lqer_asym_group lqer_enabled lqer_factor_bits lqer_rank lqer_top_k
matrix_bits matrix_clip_sigmas matrix_lr max_wallclock_seconds min_lr mlp_clip_sigmas mlp_hidden mlp_mult model_dim
model_path muon_backend_steps muon_beta2 muon_huber_delta muon_huber_wd muon_momentum muon_momentum_warmup_start
muon_momentum_warmup_steps muon_row_normalize muon_wd ngram_hint_precompute_outside ngram_tilt_enabled num_heads
num_kv_heads num_layers num_loops optrot_enabled parallel_final_lane parallel_residual_start parallel_start_layer
phased_ttt_num_phases phased_ttt_prefix_docs qk_gain_init qk_gain_schedule quantized_model_path rank rope_base rope_dims
rope_train_seq_len rope_yarn run_id scalar_lr seed skip_gates_enabled sliding_window_enabled smear_gate_enabled
sparse_attn_gate_enabled sparse_attn_gate_init_std sparse_attn_gate_scale tie_embeddings tied_embed_init_std
tied_embed_lr token_boost token_order token_threshold tokenizer_path train_batch_tokens train_files train_log_every
train_seq_len ttt_batch_size ttt_beta1 ttt_beta2 ttt_chunk_size ttt_chunk_tokens ttt_enabled ttt_epochs ttt_eval_batches
ttt_eval_seq_len ttt_grad_steps ttt_grad_steps_clean ttt_hash_buckets ttt_hash_embed ttt_k_lora ttt_lora_lr
ttt_lora_rank ttt_lr ttt_mlp_lora ttt_momentum ttt_o_lora ttt_optimizer ttt_weight_decay val_batch_size val_batch_tokens
val_bytes_files val_doc_fraction val_files val_loss_every vocab_size warmdown_frac warmdown_iters warmup_steps
within_boost within_tau word_boost word_normalize word_order word_tau world_size xsa_last_n
"""

ORDINARY = {
    "PATH": "/bin",
    "LANG": "C",
    "LC_ALL": "C",
    "TERM": "xterm",
    "CUDA_VISIBLE_DEVICES": "0",
    "CUDA_MODULE_LOADING": "LAZY",
    "OMP_NUM_THREADS": "1",
    "NCCL_ALGO": "Ring",
    "NCCL_LAUNCH_MODE": "GROUP",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCH_COMPILE_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "x",
    "XDG_SEAT": "seat0",
    "CI": "1",
    "GITHUB_RUN_ID": "1",
    "GITHUB_JOB": "x",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_BATCH_HOST": "a",
    "PBS_BATCH": "1",
    "AWS_BATCH_JOB_ID": "1",
    "MKL_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "1",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "a",
    "LOCAL_WORLD_SIZE": "1",
    "HF_DATASETS_CACHE": "x",
    "TRANSFORMERS_SEQ": "x",
    "LOGNAME": "x",
    "HOSTNAME": "x",
    "SHLVL": "1",
    "MAX_JOBS": "2",
    "LESSOPEN": "x",
    "LS_COLORS": "x",
    "DISPLAY": ":0",
    "PGOLF_BACKEND": "reference",
    "lr": "1",
}


@pytest.mark.parametrize("name", DUMPS.upper().split())
def test_every_hyperparameter_of_the_entries_is_known_taken_or_refused(name):
    known = [name in NAMES, name in TRANSLATED, bool(reason_to_refuse(name)), name in NOT_SETTINGS]
    assert sum(known) == 1, known


def test_the_tables_speak_of_what_there_is():
    assert NAMES.issuperset(TRANSLATED.values())
    for theirs in (*TRANSLATED, *REFUSED, *ALWAYS, *NOT_SETTINGS):
        assert theirs not in NAMES, f"{theirs} is a setting now"
    for theirs in ALWAYS:  # with another value it must not go unnoticed
        assert reason_to_refuse(theirs), theirs


def test_their_names_for_the_same_are_taken_and_told():
    values, notes = in_our_names({"MUON_WD": "0.1", "TOKEN_ORDER": "12", "TIE_EMBEDDINGS": "1", "PATH": "x"}, NAMES)
    assert values == {"MUON_WEIGHT_DECAY": "0.1", "NGRAM_ORDER": "12"}
    assert notes == [
        "taken: MUON_WD as MUON_WEIGHT_DECAY, TOKEN_ORDER as NGRAM_ORDER",
        "always so here: TIE_EMBEDDINGS=1",
    ]
    settings = load_settings({"PRESET": "demo", "EMBED_WD": "0.085", "EMBED_WEIGHT_DECAY": "0.085"})
    assert settings.embed_weight_decay == 0.085


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"WARMDOWN_ITERS": "1200"}, ["WARMDOWN_ITERS=1200", "WARMDOWN_FRAC"]),
        ({"TIE_EMBEDDINGS": "0"}, ["TIE_EMBEDDINGS=0", "always"]),
        ({"TTT_ENABLED": "1"}, ["TTT_ENABLED=1", "no test-time training"]),
        ({"ITERS": "9"}, ["ITERS=9", "ITERATIONS"]),
        ({"LR": "9"}, ["LR=9", "MATRIX_LR"]),
        ({"MAX_WALLCLOCK": "9"}, ["MAX_WALLCLOCK=9", "MAX_WALLCLOCK_SECONDS"]),
        ({"EMBED_LR": "0.6", "HEAD_LR": "0.008", "TTT_LR": "1"}, ["TIED_EMBED_LR", "nor can HEAD_LR, TTT_LR be used"]),
        ({"ADAM_WD": "1", "ADAM_WEIGHT_DECAY": "2"}, ["ADAM_WD=1", "ADAM_WEIGHT_DECAY=2", "two values"]),
    ],
)
def test_what_means_something_else_is_refused_with_the_reason(environ, named):
    with pytest.raises(UserError) as error:
        load_settings({"PRESET": "demo", **environ})
    assert all(part in str(error.value) for part in named)


def test_what_looks_like_a_setting_is_warned_of_and_ordinary_variables_are_not(capsys):
    values, notes = in_our_names({**ORDINARY, "SEQ_LEN": "1", "NUM_EPOCHS": "3", "DATA_DIR": "x"}, NAMES)
    assert values == {}
    assert notes == ["no settings, and not looked at: DATA_DIR, NUM_EPOCHS, SEQ_LEN (`pgolf settings` lists all)"]
    assert [name for name in ORDINARY if looks_like_a_setting(name)] == []
    note = "no settings, and not looked at: \x1b[31m"
    tell([note])
    tell([note])
    assert capsys.readouterr().err == "settings: no settings, and not looked at: \\x1b[31m\n"
