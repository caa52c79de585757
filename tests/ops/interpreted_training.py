"""Training steps with every Triton kernel under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import dataclasses

import pytest
import torch

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.optim import make_optimisers
from pgolf.settings import load_settings

STEPS, CLASSES = 8, 64
SMALL = {"PRESET": "demo", "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2"}


def losses(backend: str, seed: int, rows: torch.Tensor) -> torch.Tensor:
    """Loss of every step; rows (STEPS, 2, length)."""
    settings = load_settings(SMALL)
    config = dataclasses.replace(ModelConfig.of(settings), vocab_size=CLASSES)
    model = Model(config, torch.float32).initialise(torch.Generator().manual_seed(seed))
    optimisers = make_optimisers(model, settings)
    found = []
    with ops.backend(backend):
        for tokens in rows:
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimisers.set_rates(1.0, momentum=0.95)
            optimisers.step(loss.detach())
            found.append(loss.item())
    return torch.tensor(found)


def test_the_kernels_train_like_the_definitions():
    rows = torch.randint(0, 8, (STEPS, 2, 25)).cumsum(-1) % CLASSES
    with_kernels = losses("triton", 0, rows)
    assert {name for name, backend in ops.used().items() if backend == "triton"} == {
        "leaky_relu2_mlp",
        "newton_schulz",
        "softcapped_cross_entropy",
    }
    plain, another_seed = losses("reference", 0, rows), losses("reference", 1, rows)
    assert with_kernels.tolist() == pytest.approx(plain.tolist(), abs=1e-4)
    assert (with_kernels - plain).abs().max() < 0.05 * (another_seed - plain).abs().max(), "far within seed noise"
    assert plain[-1] < plain[0]
