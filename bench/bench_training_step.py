"""One whole training step of a preset: data, forward, backward, optimisers, moving average. And scoring.

A GPU gets an eighth of the preset's batch, its share of eight.
"""

from functools import partial

import pytest
import torch

from bench.harness.measure import Work
from bench.harness.shapes import name

pytest.importorskip("pydantic", reason="settings need pydantic")
pytest.importorskip("jinja2", reason="the record of a run needs jinja2")

from bench.harness.training_step import CUDA, RANKS, make_model, make_trainer, settings_of, take_step
from pgolf.evaluation.scoring import evaluate
from pgolf.model import Model
from pgolf.model.flops import flops_per_token
from pgolf.ops import used
from pgolf.settings import Settings


def work(model: Model, settings: Settings, tokens: int, passes: int) -> Work:
    """FLOPs by the formula of a run's MFU, bytes of the weights."""
    flops = flops_per_token(model.config, model.looping, settings.train_seq_len, passes)
    return Work(bytes=4 * model.config.parameters() * passes, flops=flops * tokens, tokens=tokens)


@pytest.mark.parametrize("preset", ["demo", "baseline", "pr1493", "pr1855", "record"])
def test_training_step(measure, preset, tmp_path):
    """Of the models with loops, the form that loops: that of the later 65% of a run."""
    if preset != "demo" and not CUDA:
        pytest.skip(f"a step of {preset} takes minutes without a GPU")
    settings = settings_of(preset)
    trainer = make_trainer(settings, tmp_path)
    step = partial(take_step, trainer)
    step()
    backends = sorted({used()[op] for op in ("leaky_relu2_mlp", "softcapped_cross_entropy", "newton_schulz")})
    measure(
        "training_step",
        preset,
        shape=f"{settings.train_batch_tokens} tokens",
        dtype=name(trainer.model.execution.dtype),
        backend=("compiled, " if trainer.compiled else "") + " ".join(backends),
        make=tuple,
        call=step,
        work=work(trainer.model, settings, settings.train_batch_tokens, passes=3),
    )


def test_scoring(measure):
    settings = settings_of("demo")
    model = make_model(settings)
    count = 16 * settings.val_batch_size if CUDA else 2 * settings.val_batch_size
    byte_counts = torch.ones(count + 1, dtype=torch.int64)

    def call(tokens):
        score = evaluate(model, tokens, byte_counts, settings.train_seq_len, settings.val_batch_size, RANKS)
        return torch.tensor(score.nats)

    measure(
        "scoring",
        "demo",
        shape=f"{count} tokens",
        dtype=name(model.execution.dtype),
        backend=used().get("softcapped_cross_entropy", "reference"),
        make=lambda: (torch.randint(settings.vocab_size, (count + 1,)),),
        call=call,
        work=work(model, settings, count, passes=1),
    )
