"""Training steps with every Triton kernel under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import dataclasses

import pytest
import torch

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.model.execution import FUSABLE, Execution
from pgolf.ops import backends
from pgolf.settings import load_settings
from pgolf.training.optim import OptimiserConfig, make_optimisers

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
    model = Model(config, Execution(fused=fused)).initialise(torch.Generator().manual_seed(seed))
    optimisers = make_optimisers(model, OptimiserConfig.of(settings))
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


@pytest.fixture
def interpreted(monkeypatch):
    """Operations of the glue that were asked for: they alone are interpreted."""
    asked = set()

    def only_the_glue(op: str, device_type: str, no_kernel_for: str = "") -> str:
        asked.update({op} & FUSABLE)
        return "triton" if op in FUSABLE else "reference"

    monkeypatch.setattr(backends, "choose", only_the_glue)
    return asked


def random_model(changes: dict[str, str]) -> Model:
    config = dataclasses.replace(ModelConfig.of(load_settings(RECORD_LIKE | changes)), vocab_size=CLASSES)
    model = Model(config).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def loss_and_gradients(model: Model, *batch) -> list[torch.Tensor]:
    loss = model.loss(*batch)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)]


def assert_alike(found: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for mine, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_gradients_with_the_fused_glue_in_packed_documents(interpreted):
    """Two lanes that part where a branch waits, run on, and merge; skips; documents that begin inside the stream."""
    model = random_model({"NUM_LAYERS": "5", "PARALLEL_START_LAYER": "3", "SMEAR_GATE_ENABLED": "1"})
    tokens, targets = torch.randint(CLASSES, (2, 1, 21))
    batch = tokens, targets, "mean", torch.tensor([0, 8, 13, 21, 21], dtype=torch.int32), 8
    plain = loss_and_gradients(model, *batch)
    model.execute(Execution(fused=FUSABLE))
    assert_alike(loss_and_gradients(model, *batch), plain)
    assert interpreted == FUSABLE - {"qk_norm_rope"}, "qkv_norm_rope takes its place"


def test_the_fused_glue_trains_like_the_plain_functions(interpreted):
    rows = torch.randint(0, 8, (3, 2, 13)).cumsum(-1) % CLASSES
    sizes = RECORD_LIKE | {"SMEAR_GATE_ENABLED": "1"}
    plain, another_seed = losses("reference", 0, rows, sizes), losses("reference", 1, rows, sizes)
    fused = losses("reference", 0, rows, sizes, FUSABLE)
    assert interpreted == FUSABLE - {"qk_norm_rope"}
    assert fused.tolist() == pytest.approx(plain.tolist(), abs=1e-4)
    assert (fused - plain).abs().max() < 0.05 * (another_seed - plain).abs().max(), "far within seed noise"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"VE_LAYERS": "0", "VE_DIM": "8"},
        {"SPARSE_ATTN_GATE_ENABLED": "0", "ATTN_OUT_GATE_ENABLED": "1", "ATTN_OUT_GATE_SRC": "q"},
        {"SPARSE_ATTN_GATE_ENABLED": "0", "XSA_LAST_N": "0"},
    ],
    ids=["sparse gate", "value embedding", "gate by query", "neither gate nor XSA"],
)
def test_one_product_for_q_k_v_and_gate_changes_nothing(changes, interpreted):
    """Loss and all gradients in float32, of packed documents, every parameter random."""
    model = random_model({"NUM_LAYERS": "1", "PARALLEL_START_LAYER": "0", **changes})
    tokens, targets = torch.randint(CLASSES, (2, 1, 17))
    batch = tokens, targets, "mean", torch.tensor([0, 5, 6, 17], dtype=torch.int32), 11
    plain = loss_and_gradients(model, *batch)
    model.execute(Execution(fused=frozenset({"qkv_norm_rope", "xsa_gate"})))
    assert_alike(loss_and_gradients(model, *batch), plain)
    assert "qkv_norm_rope" in interpreted
