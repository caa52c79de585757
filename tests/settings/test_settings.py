"""Settings: presets, environment variables, and one clear line for everything that cannot be used."""

import json
import math
from datetime import timedelta

import pytest
import torch

from pgolf.errors import MOST_LETTERS, UserError, one_line
from pgolf.settings import PRESETS, Settings, accepted, load_settings, settings_of_arguments, validate

NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]


def bounds(name):
    """(least, largest) accepted value of a number."""
    field, kinds = Settings.model_fields[name], ("ge", "gt", "le", "lt")
    found = {kind: getattr(each, kind) for each in field.metadata for kind in kinds if hasattr(each, kind)}
    low = found["ge"] if "ge" in found else math.nextafter(found["gt"], math.inf)
    return low, found["le"] if "le" in found else math.nextafter(found["lt"], -math.inf)


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
        ({"ABORT_STEP": "3"}, ["ABORT_STEP=3", "ABORT_BPB", "bits per byte"]),
        ({"NGRAM_ORDER": "1"}, ["NGRAM_ORDER=1", "2 to 16"]),
        ({"BOS_ID": "1024"}, ["BOS_ID=1024", "VOCAB_SIZE=1024"]),
        ({"NUM_LAYERS": "1000", "MODEL_DIM": "16384"}, ["NUM_LAYERS=1000", "weights", "17179869184"]),
        ({"BIGRAM_VOCAB_SIZE": "16777216", "BIGRAM_DIM": "16384"}, ["weights", "17179869184"]),
        ({"MODEL_DIM": "256.5"}, ["MODEL_DIM=256.5", "integer"]),
        ({"VE_LAYERS": "9" * 5000}, ["VE_LAYERS=9999", "1000 bytes"]),
        ({"VE_LAYERS": "9" * 500}, ["different layers"]),
        ({"RUN_ID": "a\x1b[31mb"}, ["RUN_ID=a\\x1b[31mb", "printable"]),
        ({"RUN_ID": "x\udcff"}, ["RUN_ID=x\\udcff"]),
        ({"DATA_PATH": "\udcff"}, ["DATA_PATH=\\udcff"]),
        ({"EVAL_STRIDE": "300"}, ["EVAL_STRIDE=300", "EVAL_SEQ_LEN=256"]),
    ],
)
def test_bad_values_and_near_names_are_one_line(environ, named):
    with pytest.raises(UserError) as error:
        load_settings({"PRESET": "demo", **environ})
    message = one_line(error.value)
    assert "\n" not in str(error.value)
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


def test_an_early_validation_may_come_alone_if_that_is_said():
    settings = load_settings({"PRESET": "demo", "ABORT_STEP": "3", "ABORT_BPB": "0"})
    assert validate(settings.model_dump()) == settings


def test_every_setting_says_what_it_does_and_what_it_takes():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert accepted(name), name


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_two_bounds_and_absurd_values_are_one_line(name):
    low, high = bounds(name)
    assert -math.inf < low <= Settings.model_fields[name].default <= high < math.inf
    for value in ("1e308", "-1e308", "9" * 400, "-" + "9" * 400, "9" * 5000, "nan", "inf", str(2**63), str(2**64)):
        with pytest.raises(UserError) as error:
            load_settings({"PRESET": "demo", name.upper(): value})
        message = str(error.value)
        assert message.startswith(f"{name.upper()}=")
        assert len(message) <= MOST_LETTERS
        assert "Unable" not in message
        assert "\n" not in message


def test_what_the_settings_allow_their_operations_take():
    from pgolf import ops
    from pgolf.data.loader import generator
    from pgolf.evaluation.ngram_cache import NgramCache
    from pgolf.model.rotary import rotary_tables
    from pgolf.ops.newton_schulz import step_coefficients
    from pgolf.training.muon import Muon

    bank = torch.randn(2, 4, 8)
    hessian = torch.eye(8).expand(2, 8, 8)
    for steps in bounds("muon_backend_steps"):
        assert len(step_coefficients("polar_express", steps)) == steps
    for bits in {*bounds("matrix_bits"), *bounds("lqer_factor_bits")}:
        for clip_sigmas in {*bounds("matrix_clip_sigmas"), *bounds("embed_clip_sigmas")}:
            for damping in bounds("gptq_damping"):
                ops.gptq(bank, hessian, bits, clip_sigmas, damping)
                ops.trellis_quantize(bank, hessian, clip_sigmas, bits, damping=damping)
    for softcap in bounds("logit_softcap"):
        loss = ops.softcapped_cross_entropy(torch.randn(4, 8), torch.arange(4), softcap)
        assert torch.isfinite(loss)
    for slope in bounds("mlp_slope"):
        ops.leaky_relu2_mlp(bank, torch.randn(3, 8), torch.randn(8, 3), slope)
    for base in bounds("rope_base"):
        for stretch in bounds("rope_train_seq_len"):
            tables = rotary_tables(torch.arange(4), 4, base, torch.float32, "ntk", float(stretch))
            assert all(torch.isfinite(table).all() for table in tables)
    for seed in bounds("seed"):
        torch.Generator().manual_seed(seed)
        generator(seed, 1)
    for seconds in bounds("process_timeout_seconds"):
        timedelta(seconds=seconds)
    parameter = torch.nn.Parameter(bank.clone())
    for rate in bounds("matrix_lr"):
        for decay in bounds("muon_weight_decay"):
            Muon([parameter], rate, bounds("muon_momentum")[1], beta2=bounds("muon_beta2")[1], weight_decay=decay)
            betas = bounds("beta1")[1], bounds("beta2")[1]
            torch.optim.Adam([parameter], lr=rate, betas=betas, eps=bounds("adam_eps")[0], weight_decay=decay)
    least = bounds("ngram_memory_bytes")[0]
    for order in (2, bounds("ngram_order")[1]):
        for threshold in bounds("ngram_threshold"):
            for boost in bounds("ngram_boost"):
                NgramCache(bounds("vocab_size")[1], [order], "tilt", least, threshold=threshold, boost=boost)


def test_arguments_go_before_variables_of_the_same_meaning():
    environ = {"SEED": "1", "ADAM_WD": "0.1", "MODEL_DIM": "512"}
    settings_of_arguments(["SEED=2", "ADAM_WEIGHT_DECAY=0.2", "RUN_ID=a=b"], environ)
    assert environ == {"SEED": "2", "ADAM_WEIGHT_DECAY": "0.2", "RUN_ID": "a=b", "MODEL_DIM": "512"}
    settings = load_settings({"PRESET": "baseline", **environ})
    assert (settings.seed, settings.adam_weight_decay, settings.run_id) == (2, 0.2, "a=b")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["SEED"], ["SEED", "NAME=value"]),
        (["--seed", "3"], ["--seed", "NAME=value"]),
        (["=3"], ["=3", "NAME=value"]),
        (["SEED=1", "SEED=1"], ["SEED", "twice"]),
        (["seed=1"], ["seed=1", "SEED"]),
        (["qat=ste"], ["qat=ste", "QAT"]),
        (["PATH=/bin"], ["PATH=/bin", "pgolf settings"]),
        (["RANK=1"], ["RANK=1", "pgolf settings"]),
        (["LR=1"], ["LR=1", "MATRIX_LR"]),
    ],
)
def test_arguments_that_are_no_settings_are_refused(arguments, named):
    environ = {}
    with pytest.raises(UserError) as error:
        settings_of_arguments(arguments, environ)
    assert all(part in str(error.value) for part in named)
    assert environ == {}
