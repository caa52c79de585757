"""Training steps with every Triton kernel under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import dataclasses

import pytest
import torch

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.model.glue import OPERATIONS
from pgolf.ops import backends
from pgolf.optim import make_optimisers
from pgolf.settings import load_settings

STEPS, CLASSES = 8, 64
SMALL = {"PRESET": "demo", "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2"}
RECORD_LIKE = SMALL | {
    "NUM_LAYERS": "3",
    "ROPE_DIMS": "8",
    "XSA_LAST_N": "3",
    "SPARSE_ATTN_GATE_ENABLED": "1",
    "LN_SCALE": "1",
    "UNET_SKIPS": "1",
    "SKIP_GATES_ENABLED": "1",
    "PARALLEL_START_LAYER": "2",
}


def losses(backend: str, seed: int, rows: torch.Tensor, sizes: dict[str, str] = SMALL, fused=frozenset()):
    """Loss of every step; rows (steps, 2, length)."""
    settings = load_settings(sizes)
    config = dataclasses.replace(ModelConfig.of(settings), vocab_size=CLASSES)
    model = Model(config, torch.float32).initialise(torch.Generator().manual_seed(seed))
    model.fused = fused
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


def interpret_the_glue(monkeypatch) -> set[str]:
    """From here on the glue runs by its kernels, all else by its definition; the names of what did."""
    interpreted = set()

    def only_the_glue(op: str, device_type: str, no_kernel_for: str = "") -> str:
        interpreted.update({op} & OPERATIONS)
        return "triton" if op in OPERATIONS else "reference"

    monkeypatch.setattr(backends, "choose", only_the_glue)
    return interpreted


def test_gradients_with_the_fused_glue_in_packed_documents(monkeypatch):
    """Two lanes that part where a branch waits, run on, and merge; skips; documents that begin inside the stream."""
    settings = RECORD_LIKE | {"NUM_LAYERS": "5", "PARALLEL_START_LAYER": "3", "SMEAR_GATE_ENABLED": "1"}
    config = dataclasses.replace(ModelConfig.of(load_settings(settings)), vocab_size=CLASSES)
    model = Model(config).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens, targets = torch.randint(CLASSES, (2, 1, 21))
    borders = torch.tensor([0, 8, 13, 21, 21], dtype=torch.int32)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = model.loss(tokens, targets, cu_seqlens=borders, max_seqlen=8)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)]

    with ops.backend("reference"):
        plain = loss_and_gradients()
        model.fused = OPERATIONS
        torch.testing.assert_close(loss_and_gradients(), plain, rtol=1e-4, atol=1e-5)
    interpreted = interpret_the_glue(monkeypatch)
    torch.testing.assert_close(loss_and_gradients(), plain, rtol=1e-4, atol=1e-5)
    assert interpreted == OPERATIONS


def test_the_fused_glue_trains_like_the_plain_functions(monkeypatch):
    rows = torch.randint(0, 8, (3, 2, 13)).cumsum(-1) % CLASSES
    plain, another_seed = losses("reference", 0, rows, RECORD_LIKE), losses("reference", 1, rows, RECORD_LIKE)
    interpreted = interpret_the_glue(monkeypatch)
    fused = losses("reference", 0, rows, RECORD_LIKE, OPERATIONS)
    assert interpreted == OPERATIONS
    assert fused.tolist() == pytest.approx(plain.tolist(), abs=1e-4)
    assert (fused - plain).abs().max() < 0.05 * (another_seed - plain).abs().max(), "far within seed noise"
