"""A small project for attacks on its commands: data, a finished run, weights to import, a published repository."""

import contextlib
import json
import os
import random
import runpy
import shutil
import sys
from pathlib import Path

from bench.studies.attacks.outcomes import ROOT

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from".split()  # noqa: SIM905
PIECES = 320
MODEL = f"data/data_{PIECES}_bpe.model"
TRAIN, VAL = "data/data_train_000000.bin", "data/data_val_000000.bin"
DATASET = "fineweb10B_sp1024"  # as the repository calls it
SETTINGS = {
    "PRESET": "demo",
    "DATA_PATH": "data",
    "TOKENIZER_PATH": MODEL,
    "VOCAB_SIZE": str(PIECES),
    "MODEL_DIM": "32",
    "NUM_LAYERS": "2",
    "PARALLEL_START_LAYER": "0",
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "128",
    "MICRO_BATCH_TOKENS": "128",
    "VAL_BATCH_SIZE": "1024",
    "WARMUP_STEPS": "1",
    "ITERATIONS": "3",
    "MAX_WALLCLOCK_SECONDS": "10000",
    "GPTQ_CALIBRATION_BATCHES": "1",
    "QUANTIZER": "rtn",
    "NGRAM": "off",
    "DTYPE": "float32",
    "DEVICE": "cpu",
    "OUT_DIR": "runs",
}


def make_project(folder: Path) -> None:
    """By a process of its own, since whoever forks should have started no threads."""
    folder.mkdir(parents=True)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(2, 1)
            os.chdir(folder)
            _make()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the small project could not be made")


def _make() -> None:
    from pgolf.data.prepare import tokenize_files

    for name, pieces in (("data", PIECES), ("other", PIECES + 10)):
        Path(f"{name}.txt").write_text("\n\n".join(_documents(name)), encoding="utf-8")
        tokenize_files([f"{name}.txt"], name, pieces)
    _make_repository(Path("hub/datasets"))
    os.environ.update(SETTINGS, RUN_ID="good")
    sys.argv = [str(ROOT / "train_gpt.py")]
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    _make_weights()  # needs a checkpoint


def _documents(seed: str) -> list[str]:
    choice = random.Random(seed)
    return [" ".join(choice.choices(WORDS, k=1500)) + "." for _ in range(12)]


def _make_repository(root: Path) -> None:
    """As Hugging Face has it."""
    (root / "datasets" / DATASET).mkdir(parents=True)
    (root / "tokenizers").mkdir()
    shutil.copyfile(MODEL, root / "tokenizers" / "sp.model")
    for split, shard in (("train", TRAIN), ("val", VAL)):
        shutil.copyfile(shard, root / "datasets" / DATASET / f"fineweb_{split}_000000.bin")
    entry = {"name": DATASET, "tokenizer_name": "sp", "stats": {"files_train": 1, "files_val": 1}}
    manifest = {"datasets": [entry], "tokenizers": [{"name": "sp", "path": "tokenizers/sp.model"}]}
    (root / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _make_weights() -> None:
    """weights.pt: a state dict as an entry's script saves it, of the finished run's model."""
    import torch

    from pgolf.artifact.import_checkpoint import weight_map
    from pgolf.model import ModelConfig
    from pgolf.settings import load_settings
    from pgolf.training import checkpoint

    weights = dict(checkpoint.weights(Path("runs/good")))
    state, whole = {}, set()
    for theirs, place in weight_map(ModelConfig.of(load_settings(SETTINGS))).items():
        if place.row is None:
            state[theirs] = weights[place.name]
            whole.add(place.name)
        elif place.name not in whole:
            state[theirs] = weights[place.name][place.row].clone()
    torch.save(state, "weights.pt")
