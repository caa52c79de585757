"""The step of `pr1855` on one GPU with an eighth of the batch, before its layers are looped and after.

Beside #1855's own script, with the same attention, and beside what is not on by itself: fused glue, CUDA graphs.
bench/gpu.sh runs it where PGOLF_RECORD_STEP asks for it: every contender is compiled, which takes minutes.
"""

from functools import partial

import pytest
import torch

from bench.bench_training_step import work
from bench.harness.shapes import name
from bench.harness.training_step import CUDA, DEVICE, make_loader, make_trainer, settings_of, take_step
from bench.peers import contenders

PRESET = "pr1855"
VARIANTS = {
    "FUSED_GLUE=on": {"FUSED_GLUE": "on"},
    "CUDA_GRAPHS=on": {"CUDA_GRAPHS": "on"},
    "both": {"FUSED_GLUE": "on", "CUDA_GRAPHS": "on"},
}
STEPS_TO_REPLAY = 3


def when_called(make):
    """A step that is made when it is first called, and then taken until it is compiled and captured: what cannot be had
    here is left out by `measure`, with a warning."""
    made = []

    def call() -> torch.Tensor:
        if not made:
            step = make()
            for _ in range(STEPS_TO_REPLAY):
                step()
            made.append(step)
        return made[0]()

    return call


@pytest.mark.parametrize(("phase", "last"), [("before loops", False), ("with loops", True)])
def test_record_step(measure, phase, last, tmp_path):
    if not CUDA:
        pytest.skip(f"a step of {PRESET} takes minutes without a GPU")
    settings = settings_of(PRESET)
    trainer = make_trainer(settings, tmp_path, last_phase=last)

    def variant(environ):
        return partial(take_step, make_trainer(settings_of(PRESET, **environ), tmp_path, last_phase=last))

    peers = {label: when_called(partial(variant, environ)) for label, environ in VARIANTS.items()}
    execution = trainer.model.execution
    for label, make in contenders("training_step", "pr_1855").items():
        arguments = (settings, execution.attention, trainer.model.looping, make_loader(settings, tmp_path), DEVICE)
        peers[label] = when_called(partial(make, *arguments))
    measure(
        "record_step",
        f"{PRESET} {phase}",
        shape=f"{settings.train_batch_tokens} tokens",
        dtype=name(execution.dtype),
        backend=f"compiled, attention {execution.attention}",
        make=tuple,
        call=partial(take_step, trainer),
        work=work(trainer.model, settings, settings.train_batch_tokens, passes=3),
        peers=peers,
        tolerance=None,
    )
