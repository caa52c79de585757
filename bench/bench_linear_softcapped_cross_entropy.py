"""The head and the loss in one operation, beside the two steps: in plain PyTorch, with our loss, with the record's."""

import pytest
import torch
import torch.nn.functional as F

from bench.harness.measure import Call, Work
from bench.harness.shapes import SHAPES, name, text
from bench.peers import contenders
from pgolf import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SOFTCAP = 30.0
TOKENS, CLASSES = SHAPES.logits
DIM = SHAPES.mlp[1]


def eager(hidden, weight, targets):
    return F.cross_entropy(SOFTCAP * torch.tanh(F.linear(hidden, weight).float() / SOFTCAP), targets)


def ours(hidden, weight, targets):
    return ops.linear_softcapped_cross_entropy(hidden, weight, targets, SOFTCAP)


def two_steps(loss: Call) -> Call:
    return lambda hidden, weight, targets: loss(F.linear(hidden, weight), targets, SOFTCAP)


def backward_too(loss: Call) -> Call:
    def run(hidden, weight, targets):
        return torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

    return run


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
def test_linear_softcapped_cross_entropy(measure, dtype):
    def make():
        hidden = torch.randn(TOKENS, DIM, device=DEVICE).to(dtype).requires_grad_()
        weight = (5 * torch.randn(CLASSES, DIM, device=DEVICE) / DIM**0.5).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(CLASSES, (TOKENS,), device=DEVICE)

    others = {"eager": eager, "linear, then the loss": two_steps(ops.softcapped_cross_entropy)}
    if CUDA:
        others["torch.compile"] = torch.compile(eager)
    peers = contenders("softcapped_cross_entropy", "parameter_golf") if CUDA else {}
    call = backward_too(ours)
    call(*make())
    measure(
        "linear_softcapped_cross_entropy",
        "forward + backward",
        shape=text((TOKENS, DIM, CLASSES)),
        dtype=name(dtype),
        backend=ops.used()["linear_softcapped_cross_entropy"],
        make=make,
        call=call,
        others={key: backward_too(other) for key, other in others.items()},
        peers={f"linear, then {key}": backward_too(two_steps(peer)) for key, peer in peers.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        work=Work(  # hidden, weight and targets in, two gradients out; no logits
            bytes=2 * (TOKENS + CLASSES) * DIM * dtype.itemsize + 8 * TOKENS,
            flops=6 * TOKENS * DIM * CLASSES,
        ),
    )
