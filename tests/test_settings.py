"""Settings: presets, environment variables, and one clear line for everything that cannot be used."""

import json

import pytest

from pgolf.errors import UserError
from pgolf.settings import PRESETS, load_settings, validate


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_valid_and_survives_json(preset):
    settings = load_settings({"PRESET": preset})
    assert settings.preset == preset
    assert validate(json.loads(json.dumps(settings.model_dump()))) == settings


def test_every_field_is_set_by_its_upper_case_name():
    settings = load_settings({"PRESET": "demo", "SEED": "42", "QK_GAIN_INIT": "5.25", "MUON_ROW_NORMALIZE": "0"})
    assert (settings.seed, settings.qk_gain_init, settings.muon_row_normalize) == (42, 5.25, False)
    assert settings.model_dim == PRESETS["demo"]["model_dim"]


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"PRESET": "dmeo"}, ["PRESET", "dmeo", "demo"]),
        ({"MODEL_DIM": "abc"}, ["MODEL_DIM", "abc", "integer"]),
        ({"MODEL_DIM": ""}, ["MODEL_DIM", "integer"]),
        ({"MODEL_DIM": "-4"}, ["MODEL_DIM", "-4", "must be 1 to 16384"]),
        ({"QK_GAIN_INIT": "nan"}, ["QK_GAIN_INIT", "nan"]),
        ({"MATRIX_BITS": "9"}, ["MATRIX_BITS", "9", "8"]),
        ({"DEVICE": "tpu"}, ["DEVICE", "tpu", "cuda"]),
        ({"COMPILE": "maybe"}, ["COMPILE", "maybe", "auto"]),
        ({"SEDD": "1"}, ["SEDD", "SEED"]),
        ({"SEDE": "1"}, ["SEDE", "SEED"]),
        ({"TRAIN_BATCH_TOKEN": "1024"}, ["TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"]),
        ({"max_walclock_seconds": "5"}, ["max_walclock_seconds", "MAX_WALLCLOCK_SECONDS"]),
        ({"MODEL_DIM": "250", "NUM_HEADS": "4"}, ["MODEL_DIM=250", "NUM_HEADS=4"]),
        ({"NUM_KV_HEADS": "3"}, ["NUM_HEADS", "NUM_KV_HEADS=3"]),
        ({"TRAIN_BATCH_TOKENS": "1000"}, ["TRAIN_BATCH_TOKENS=1000", "TRAIN_SEQ_LEN"]),
        ({"MLP_MULT": "0.501"}, ["MLP_MULT", "whole"]),
        ({"MAX_WALLCLOCK_SECONDS": "1"}, ["MAX_WALLCLOCK_SECONDS=1", "GPTQ_RESERVE_SECONDS"]),
        ({"EMBED_BITS": "12"}, ["EMBED_BITS=12", "2 to 8, or 16"]),
        ({"ATTENTION": "flash2"}, ["ATTENTION", "flash2", "sdpa"]),
        ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66", "64"]),
        ({"ROPE_DIMS": "3"}, ["ROPE_DIMS=3", "even"]),
        ({"NUM_LOOPS": "1", "LOOP_START": "2", "LOOP_END": "3"}, ["LOOP_END=3", "0 to 2"]),
        ({"NUM_LOOPS": "999", "LOOP_END": "1"}, ["NUM_LOOPS=999", "1000"]),
        ({"PARALLEL_START_LAYER": "2", "PARALLEL_RESIDUAL_START": "1"}, ["PARALLEL_START_LAYER=2", "only one form"]),
        ({"PARALLEL_START_LAYER": "3"}, ["PARALLEL_START_LAYER=3", "1 to NUM_LAYERS - 1 = 2"]),
        ({"ATTN_OUT_GATE_ENABLED": "1", "SPARSE_ATTN_GATE_ENABLED": "1"}, ["ATTN_OUT_GATE_ENABLED", "one gate"]),
        ({"GATE_WINDOW": "300"}, ["GATE_WINDOW=300", "MODEL_DIM"]),
        ({"VE_LAYERS": "1,3"}, ["VE_LAYERS='1,3'", "below NUM_LAYERS=3"]),
        ({"VE_LAYERS": "1,1"}, ["VE_LAYERS='1,1'", "different"]),
        ({"BIGRAM_VOCAB_SIZE": "1"}, ["BIGRAM_VOCAB_SIZE=1", "at least 2"]),
        ({"RUN_ID": "../elsewhere"}, ["RUN_ID", "file name"]),
        ({"TRAIN_SEQ_SCHEDULE": "128"}, ["TRAIN_SEQ_SCHEDULE=128", "LENGTH@FRACTION"]),
        ({"TRAIN_SEQ_SCHEDULE": "128@0.5,64@0.4"}, ["'64@0.4'", "larger than the one before"]),
        ({"TRAIN_SEQ_SCHEDULE": "100@0.5"}, ["100", "must divide TRAIN_SEQ_LEN=256", "LOADER=documents"]),
        ({"TRAIN_SEQ_SCHEDULE": "512@0.5", "LOADER": "documents"}, ["512", "up to it"]),
        ({"QAT": "ste", "LATE_QAT_THRESHOLD": "0.01"}, ["LATE_QAT_THRESHOLD=0.01", "never reached", "MIN_LR=0.05"]),
        ({"QAT": "ste", "LATE_QAT_THRESHOLD": "0.5", "WARMDOWN_FRAC": "0"}, ["LATE_QAT_THRESHOLD", "WARMDOWN_FRAC=0"]),
        ({"SWA_EVERY": "50"}, ["EMA_DECAY=0.97", "SWA_EVERY=50"]),
        ({"ABORT_BPB": "3"}, ["ABORT_BPB=3", "ABORT_STEP"]),
        ({"EVAL_STRIDE": "300"}, ["EVAL_STRIDE=300", "EVAL_SEQ_LEN=256"]),
    ],
)
def test_bad_values_and_near_names_are_one_line(environ, named):
    with pytest.raises(UserError) as error:
        load_settings({"PRESET": "demo", **environ})
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_sequence_lengths_follow_their_schedule():
    def stages(schedule, **environ):
        return load_settings({"PRESET": "demo", "TRAIN_SEQ_SCHEDULE": schedule, **environ}).train_seq_stages

    assert stages("") == [(1.0, 256)]
    assert stages("64@0.1, 128@0.7") == [(0.1, 64), (0.7, 128), (1.0, 256)]
    assert stages("100@0.1,200@0.7,250@1", LOADER="documents") == [(0.1, 100), (0.7, 200), (1.0, 250)]


def test_unrelated_variables_are_left_alone():
    environ = {
        "PRESET": "demo",
        "HOME": "/",
        "PATH": "",
        "USER": "x",
        "SEEDLINGS": "1",
        "TERM": "x",
        "DEVICE_ORDER": "1",
    }
    assert load_settings(environ).preset == "demo"


def test_unknown_field_in_a_settings_file_is_named():
    with pytest.raises(UserError, match="colour: no such setting"):
        validate({"colour": 1})


def test_run_ids_are_made_from_time_preset_and_seed():
    assert load_settings({"PRESET": "demo", "SEED": "7"}).run_id.endswith("-demo-s7")
