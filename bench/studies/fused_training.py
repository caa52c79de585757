"""Losses of training with the glue fused beside those with the plain functions, step by step, and of another seed.

    TRITON_INTERPRET=1 TRAIN_BATCH_TOKENS=512 python -m bench.studies.fused_training --steps 200

The preset is `demo` unless PRESET says otherwise; every setting has its variable, as in train_gpt.py. With
TRITON_INTERPRET=1 the kernels of the glue run on the CPU, and all else by its definition.
"""

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from pgolf.data.dataset import open_dataset, training_loader
from pgolf.model import Model, ModelConfig
from pgolf.model.execution import FUSABLE, Execution
from pgolf.ops import backends
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings, load_settings
from pgolf.training.trainer import Trainer

TELL_EVERY = 50
INTERPRETED_TILE = 1 << 16  # values of a block


def losses(settings: Settings, fused: frozenset[str], steps: int) -> Iterator[float]:
    """Of every step."""
    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loader = training_loader(settings, open_dataset(settings, ranks).train_shards, ranks)
    model = Model(ModelConfig.of(settings), Execution(fused=fused))
    model.initialise(torch.Generator().manual_seed(settings.seed)).to(ranks.device)
    trainer = Trainer(model, loader, settings, ranks, SimpleNamespace())  # type: ignore[arg-type]
    for trainer.step in range(steps):
        yield trainer.take_step(trainer.schedule.lr_scale(trainer.step / steps)).item()


def interpret_the_glue_only() -> None:
    """Kernels for the glue, in large blocks because the interpreter's time is by block; definitions for the rest."""
    for operation in FUSABLE:
        module = importlib.import_module(f"pgolf.triton_kernels.{operation}")
        module.SAFE_LAUNCH = dataclasses.replace(module.SAFE_LAUNCH, tile=INTERPRETED_TILE)
    backends.choose = lambda op, *_: "triton" if op in FUSABLE else "reference"  # type: ignore[assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    settings = load_settings({"PRESET": "demo", **os.environ})
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        interpret_the_glue_only()
    another = settings.model_copy(update={"seed": settings.seed + 1})
    runs = zip(
        losses(settings, frozenset(), steps),
        losses(settings, FUSABLE, steps),
        losses(another, frozenset(), steps),
        strict=True,
    )
    most = [0.0, 0.0]
    for step, (plain, *others) in enumerate(runs, 1):
        most = [max(so_far, abs(other - plain)) for so_far, other in zip(most, others, strict=True)]
        if step in (3, steps) or step % TELL_EVERY == 0:
            print(
                f"{step} steps: loss {plain:.6f}; so far fused differs by at most {most[0]:.1e}, another seed by "
                f"{most[1]:.1e}; {time.process_time():.0f} CPU s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
