"""The loss, forward and backward, beside the same formula in plain PyTorch, eager and (on CUDA) compiled."""

import pytest
import torch
import torch.nn.functional as F
from harness import Work
from shapes import SHAPES, name, text

from pgolf import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOFTCAP = 30.0


def eager(logits, targets):
    return F.cross_entropy(SOFTCAP * torch.tanh(logits.float() / SOFTCAP), targets)


def backward_too(loss):
    def run(logits, targets):
        return torch.autograd.grad(loss(logits, targets), logits)

    return run


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
def test_softcapped_cross_entropy(measure, dtype):
    tokens, classes = SHAPES.logits

    def make():
        logits = (5 * torch.randn(tokens, classes, device=DEVICE)).to(dtype).requires_grad_()
        return logits, torch.randint(classes, (tokens,), device=DEVICE)

    def ours(logits, targets):
        return ops.softcapped_cross_entropy(logits, targets, SOFTCAP)

    others = {"eager": eager, "torch.compile": torch.compile(eager)} if DEVICE == "cuda" else {"eager": eager}
    call = backward_too(ours)
    call(*make())
    measure(
        "softcapped_cross_entropy",
        "forward + backward",
        shape=text(SHAPES.logits),
        dtype=name(dtype),
        backend=ops.used()["softcapped_cross_entropy"],
        make=make,
        call=call,
        others={key: backward_too(other) for key, other in others.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        work=Work(bytes=2 * tokens * classes * dtype.itemsize + 8 * tokens),  # logits once in, once out
    )
