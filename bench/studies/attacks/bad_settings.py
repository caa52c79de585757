"""Kinds of bad input that are settings, words of the command line, or the environment."""

import random
from collections.abc import Callable
from dataclasses import replace

from bench.studies.attacks.calls import Call, evaluate, train
from bench.studies.attacks.small_project import MODEL, SETTINGS

Kind = Callable[[random.Random], Call]
LONG = "x" * 5000
ESCAPES = "a\x1b[2J\x07\u202eb"
NEW = ("runs/new", "runs/new/*")


def setting(chance: random.Random, named: str, **environ: str) -> Call:
    """As variables of the script, as arguments of `pgolf train`, or of another command that takes settings."""
    door = chance.randrange(4)
    if door == 0:
        return train(named, **environ)
    if door == 1:
        return train(named, tuple(f"{name}={value}" for name, value in environ.items()), "train")
    if door == 2:
        return Call(("size", "--preset", "demo"), named, {**SETTINGS, **environ})
    words = ("import-checkpoint", "weights.pt", "--preset", "demo", "--output", "new.pgolf")
    return Call(words, named, {**SETTINGS, **environ})


def one_of(name: str, *values: str) -> Kind:
    return lambda chance: setting(chance, f"{name}=", **{name: chance.choice(values)})


def together(named: str, **environ: str) -> Kind:
    return lambda chance: setting(chance, named, **environ)


def any_number(*values: str, whole: bool = False) -> Kind:
    """Any setting that is a number."""

    def kind(chance: random.Random) -> Call:
        from pgolf.settings import Settings

        types = (int,) if whole else (int, float)
        name = chance.choice([name.upper() for name, each in Settings.model_fields.items() if each.annotation in types])
        return setting(chance, f"{name}=", **{name: chance.choice(values)})

    return kind


def misspelt(chance: random.Random) -> Call:
    """With a letter lost or doubled, or two exchanged."""
    from pgolf.settings import NAMES

    name = chance.choice(sorted(each for each in NAMES if len(each) > 8))
    at = chance.choice([at for at in range(1, len(name) - 1) if name[at] != name[at + 1]])
    before, letter, after = name[:at], name[at], name[at + 1 :]
    wrong = chance.choice((before + after, before + letter + letter + after, before + after[0] + letter + after[1:]))
    return setting(chance, wrong, **{wrong: "1"})


def script(named: str, **environ: str) -> Kind:
    return lambda chance: train(named, **environ)


def words(*calls: tuple[str, ...]) -> Kind:
    """The last of each is what must be named."""

    def kind(chance: random.Random) -> Call:
        *given, named = chance.choice(calls)
        return Call(tuple(given), named)

    return kind


def two_at_once(chance: random.Random) -> Call:
    call = train("a run is at work in runs/new", ITERATIONS="40")
    return replace(call, rival="runs/new/settings.json", may_change=NEW)


def diverging(chance: random.Random) -> Call:
    """Weight decay by which the matrices grow by a fifth a step, and come to nothing good after some 130."""
    growing = {"MATRIX_LR": "1000", "MUON_WEIGHT_DECAY": "0.0022", "ITERATIONS": "20000"}
    call = train("kept: checkpoint.pt", **growing, CHECKPOINT_MINUTES="0.0001")
    left = ("runs/new/summary.json", "runs/new/report.html", "runs/new/checkpoint.pt")
    return replace(call, status=(5,), silent=(5,), may_change=NEW, leaves=left)


def too_large(chance: random.Random) -> Call:
    """A model, or a batch, that memory does not hold."""
    model = {"MODEL_DIM": "8192", "NUM_LAYERS": "12"}
    batch = {"TRAIN_BATCH_TOKENS": "4194304", "MICRO_BATCH_TOKENS": "4194304"}
    return replace(train("out of memory", **chance.choice((model, batch))), may_lack_memory=True)


KINDS: dict[str, Kind] = {
    "a misspelt setting": misspelt,
    "a number too large": any_number("1e300", "9" * 40, str(2**64)),
    "a negative number": any_number("-2", "-1e9", str(-(2**63)), whole=True),
    "a fraction for a whole number": any_number("1.5", "1e-3", whole=True),
    "NaN": any_number("nan", "NaN", "-nan"),
    "infinity": any_number("inf", "-inf", "1e999"),
    "an empty number": any_number("", " ", "\t"),
    "a number of 10,000 digits": any_number("1" * 10_000, "-" + "3" * 10_000 + ".5"),
    "digits of other scripts": any_number("\u0661\u0662", "\uff11", whole=True),
    "a word for a number": any_number("many", "0x10", "None", "1,5"),
    "SEED beyond 63 bits": one_of("SEED", str(2**64), str(2**63), "-1"),
    "GPTQ_DAMPING out of range": one_of("GPTQ_DAMPING", "2", "0", "-1"),
    "MUON_BACKEND_STEPS out of range": one_of("MUON_BACKEND_STEPS", "101", "0"),
    "MATRIX_CLIP_SIGMAS out of range": one_of("MATRIX_CLIP_SIGMAS", "1e30", "0", "1e-9"),
    "MLP_MULT out of range": one_of("MLP_MULT", "1e308", "0", "0.33333"),
    "MATRIX_LR out of range": one_of("MATRIX_LR", "10000", "-0.1"),
    "LOGIT_SOFTCAP out of range": one_of("LOGIT_SOFTCAP", "1e308", "0"),
    "a choice that there is not": one_of("QUANTIZER", "awq", "GPTQ", ""),
    "a switch that there is not": one_of("COMPILE", "maybe", "1", "ON"),
    "a truth that there is not": one_of("UNET_SKIPS", "perhaps", "2", "-1"),
    "a preset that there is not": lambda chance: train(
        "PRESET=", PRESET=chance.choice(("dmeo", "../demo", LONG, ESCAPES, "\udcff"))
    ),
    "heads that do not divide": together("MODEL_DIM=33", MODEL_DIM="33"),
    "an odd head": together("MODEL_DIM / NUM_HEADS", MODEL_DIM="12", NUM_HEADS="4"),
    "a batch that does not divide": together("TRAIN_BATCH_TOKENS=100", TRAIN_BATCH_TOKENS="100"),
    "a loop of no layers": together("LOOP_START=1", NUM_LOOPS="2", LOOP_START="1", LOOP_END="0"),
    "a loop without end": together("NUM_LOOPS=900", NUM_LOOPS="900", LOOP_START="0", LOOP_END="1"),
    "a model that no machine holds": together("weights", NUM_LAYERS="1000", MODEL_DIM="16384"),
    "two averages": together("EMA_DECAY", EMA_DECAY="0.9", SWA_EVERY="3"),
    "two residuals": together("PARALLEL", PARALLEL_START_LAYER="1", PARALLEL_RESIDUAL_START="1"),
    "layers that there are not": one_of("VE_LAYERS", "7", "1,1", "-1", "1;2", "9" * 900),
    "a wrong schedule": one_of(
        "TRAIN_SEQ_SCHEDULE", "32", "32@nan", "32@2", "64@0.5", "@,@", "1e3@0.5", "32@0.5,16@0.4"
    ),
    "no time to train": together("MAX_WALLCLOCK_SECONDS=1", MAX_WALLCLOCK_SECONDS="1"),
    "time for no step": script("too small for one step", MAX_WALLCLOCK_SECONDS="1e-7", GPTQ_RESERVE_SECONDS="0"),
    "settings of other entries": one_of("TTT_ENABLED", "1"),
    "RUN_ID that leads away": one_of("RUN_ID", "..", ".", "../x", "/tmp/x", "a/b"),
    "RUN_ID that no terminal shows": one_of("RUN_ID", "a\nb", ESCAPES, "\udcff\udcfe", "a\u2028b"),
    "RUN_ID too long": lambda chance: train("File name too long", RUN_ID="x" * chance.choice((256, 999))),
    "DATA_PATH that no terminal shows": one_of("DATA_PATH", "a\nb", ESCAPES, "\udcff", LONG),
    "DATA_PATH that is none": lambda chance: train(
        "DATA_PATH=", DATA_PATH=chance.choice(("", "nowhere", "..", MODEL, "x" * 900))
    ),
    "TOKENIZER_PATH that is none": lambda chance: train(
        "tokenizer", TOKENIZER_PATH=chance.choice(("", "nowhere", "..", "x" * 900))
    ),
    "OUT_DIR that cannot be": lambda chance: train(
        "folder", OUT_DIR=chance.choice(("/proc/x", MODEL, f"{MODEL}/x", "x" * 900))
    ),
    "RUN_ID taken": lambda chance: train("runs/good holds a run already", RUN_ID="good"),
    "RUN_ID a file's": lambda chance: train("data.txt", OUT_DIR=".", RUN_ID="data.txt"),
    "RESUME of nothing": lambda chance: train(
        "RESUME=", RESUME=chance.choice(("nowhere", "data", "..", MODEL, "x" * 900))
    ),
    "RESUME with other settings": lambda chance: train("it keeps its settings", RESUME="runs/good", SEED="5"),
    "RUN_ID twice at once": two_at_once,
    "rates that diverge": diverging,
    "more than memory": too_large,
    "a backend that there is not": script("PGOLF_BACKEND=", PGOLF_BACKEND=f"cuda{ESCAPES}"),
    "a backend without kernels": script("PGOLF_BACKEND=triton", PGOLF_BACKEND="triton"),
    "a backend that is absent, compiled": script("triton", PGOLF_BACKEND="triton", COMPILE="on", QUANTIZER="rtn"),
    "a device that is absent": script("DEVICE=cuda", DEVICE="cuda"),
    "attention that is absent": lambda chance: train(
        "ATTENTION=", ATTENTION=chance.choice(("flash3", "flash4", "varlen"))
    ),
    "processes that are none": lambda chance: train(
        "WORLD_SIZE=", WORLD_SIZE=chance.choice(("x", "2", "0", "-1", "1e3", "9" * 50, ESCAPES))
    ),
    "a port that is none": script("MASTER_PORT=", WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="x"),
    "a rank beyond the world": script("RANK=7 ", RANK="7", WORLD_SIZE="1"),
    "arguments that are none": lambda chance: train(
        "", chance.choice((("SEED",), ("=1",), ("SEED=1", "SEED=2"), (ESCAPES,), (LONG,), ("--seed=1",), ("",)))
    ),
    "commands that are none": words(
        ("fly", "fly"),
        ("data", "required"),
        ("artifact", "verify", "required"),
        ("", "invalid"),
        (ESCAPES, "choice"),
        (LONG, "choice"),
    ),
    "options that are none": words(
        ("doctor", "--yes", "--yes"),
        ("size", "--preset", "expected"),
        ("eval", "runs/good", "--stride", "x", "--stride"),
        ("eval", "runs/good", "--ngram", "5", "--ngram"),
        ("data", "tokenize", "data.txt", "required"),
        ("data", "download", "--train-shards", "9" * 5000, "--train-shards"),
    ),
    "targets that are none": words(
        *(
            (*command, target, "nowhere")
            for command in (
                ("eval",),
                ("size",),
                ("artifact", "show"),
                ("artifact", "compare"),
                ("data", "inspect"),
                ("import-checkpoint",),
            )
            for target in ("nowhere",)
        ),
    ),
    "targets that no terminal shows": words(
        *(
            (*command, target, "")
            for command in (
                ("eval",),
                ("size",),
                ("artifact", "verify"),
                ("data", "inspect"),
                ("import-checkpoint",),
                ("settings",),
                ("presets",),
            )
            for target in (ESCAPES, "\udcff", "a\nb", LONG)
        ),
    ),
    "settings and presets that are none": words(
        ("settings", "warp", "warp"), ("presets", "warp", "warp"), ("presets", LONG, "no such preset")
    ),
    "a context that is none": lambda chance: evaluate(
        "--seq-len", "--seq-len", chance.choice(("0", "-1", "131073", str(10**12)))
    ),
    "a stride that is none": lambda chance: evaluate("--stride", "--stride", chance.choice(("-1", "33", str(2**70)))),
    "a preset beside a target": words(("size", "runs/good", "--preset", "demo", "--preset")),
}
