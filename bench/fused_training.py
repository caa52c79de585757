"""Losses of training with the glue fused beside those with the plain functions, step by step, and of another seed.

    TRITON_INTERPRET=1 TRAIN_BATCH_TOKENS=512 python bench/fused_training.py --steps 200

The preset is `demo` unless PRESET says otherwise; every setting has its variable, as in train_gpt.py. With
TRITON_INTERPRET=1 the kernels of the glue run on the CPU, and all else by its definition.
"""

import argparse
import dataclasses
import importlib
import os
import sys
import time
from types import SimpleNamespace

import torch

from pgolf.dataset import open_dataset, training_loader
from pgolf.distributed import Ranks
from pgolf.model import Model, ModelConfig
from pgolf.model.glue import OPERATIONS
from pgolf.ops import backends
from pgolf.schedule import lr_scale
from pgolf.settings import Settings, load_settings
from pgolf.train import Trainer

FIRST = (50, 100)
INTERPRETED_TILE = 1 << 15  # values of a block


def losses(settings: Settings, fused: frozenset[str], steps: int) -> list[float]:
    """Of every step."""
    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loader = training_loader(settings, open_dataset(settings, ranks).train_shards, ranks)
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(settings.seed)).to(ranks.device)
    model.fused = fused
    trainer = Trainer(model, loader, settings, ranks, SimpleNamespace())  # type: ignore[arg-type]
    found, begin = [], time.process_time()
    for trainer.step in range(steps):
        found.append(trainer.take_step(lr_scale(settings, trainer.step / steps)).item())
        if trainer.step + 1 in (3, steps):
            seconds = (time.process_time() - begin) / (trainer.step + 1)
            print(f"seed {settings.seed}, {len(fused)} fused: {seconds:.2f} CPU s a step", flush=True)
    return found


def report(name: str, some: list[float], others: list[float]) -> None:
    apart = [abs(a - b) for a, b in zip(some, others, strict=True)]
    parts = [f"{max(apart[:n]):.1e} in the first {n}" for n in FIRST if n < len(apart)]
    print(
        f"{name}: losses differ by at most {', '.join([*parts, f'{max(apart):.1e} in all {len(apart)}'])}", flush=True
    )


def interpret_the_glue_only() -> None:
    """Kernels for the glue, in large blocks because the interpreter's time is by block; definitions for the rest."""
    for operation in OPERATIONS:
        module = importlib.import_module(f"pgolf.triton_kernels.{operation}")
        module.SAFE_LAUNCH = dataclasses.replace(module.SAFE_LAUNCH, tile=INTERPRETED_TILE)
    backends.choose = lambda op, *_: "triton" if op in OPERATIONS else "reference"  # type: ignore[assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    settings = load_settings({"PRESET": "demo", **os.environ})
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        interpret_the_glue_only()
    plain = losses(settings, frozenset(), steps)
    another = settings.model_copy(update={"seed": settings.seed + 1})
    report("another seed", losses(another, frozenset(), steps), plain)
    fused = losses(settings, OPERATIONS, steps)
    report("fused", fused, plain)
    print(f"last losses: plain {plain[-1]:.6f}, fused {fused[-1]:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
