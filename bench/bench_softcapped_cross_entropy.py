"""The loss, beside the same formula in plain PyTorch, eager and (on CUDA) compiled, and beside the record's kernel.

modded-nanogpt's kernel is built for another vocabulary; a warning says so.
"""

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


def eager(logits, targets):
    return F.cross_entropy(SOFTCAP * torch.tanh(logits.float() / SOFTCAP), targets)


def ours(logits, targets):
    return ops.softcapped_cross_entropy(logits, targets, SOFTCAP)


def backward_too(loss: Call) -> Call:
    def run(logits, targets):
        return torch.autograd.grad(loss(logits, targets), logits)

    return run


def capped(loss: Call) -> Call:
    return lambda logits, targets: loss(logits, targets, SOFTCAP)


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("case", ["forward", "forward + backward"])
def test_softcapped_cross_entropy(measure, case, dtype):
    tokens, classes = SHAPES.logits
    backward = case != "forward"
    wrap = backward_too if backward else lambda loss: loss

    def make():
        logits = (5 * torch.randn(tokens, classes, device=DEVICE)).to(dtype).requires_grad_(backward)
        return logits, torch.randint(classes, (tokens,), device=DEVICE)

    others = {"eager": eager, "torch.compile": torch.compile(eager)} if CUDA else {"eager": eager}
    peers = contenders("softcapped_cross_entropy", "parameter_golf", "modded_nanogpt") if CUDA else {}
    call = wrap(ours)
    call(*make())
    measure(
        "softcapped_cross_entropy",
        case,
        shape=text(SHAPES.logits),
        dtype=name(dtype),
        backend=ops.used()["softcapped_cross_entropy"],
        make=make,
        call=call,
        others={key: wrap(other) for key, other in others.items()},
        peers={key: wrap(capped(peer)) for key, peer in peers.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        # logits once in and, with the gradient, once out
        work=Work(bytes=(2 if backward else 1) * tokens * classes * dtype.itemsize + 8 * tokens),
    )
