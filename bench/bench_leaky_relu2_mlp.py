"""The feed-forward block, beside the same formula in plain PyTorch, eager and (on CUDA) compiled."""

import pytest
import torch
import torch.nn.functional as F
from harness import Work
from shapes import SHAPES, name, text

from pgolf import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPE = 0.5


def eager(x, w_up, w_down):
    return F.linear(F.leaky_relu(F.linear(x, w_up), SLOPE).square(), w_down)


def backward_too(mlp):
    def run(x, w_up, w_down, grad):
        return torch.autograd.grad(mlp(x, w_up, w_down), (x, w_up, w_down), grad)

    return run


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("case", ["forward", "forward + backward"])
def test_leaky_relu2_mlp(measure, case, dtype):
    tokens, dim, hidden = SHAPES.mlp
    backward = case != "forward"

    def make():
        x = torch.randn(tokens, dim, device=DEVICE).to(dtype).requires_grad_(backward)
        w_up = (torch.randn(hidden, dim, device=DEVICE) / dim**0.5).to(dtype).requires_grad_(backward)
        w_down = (torch.randn(dim, hidden, device=DEVICE) / hidden**0.5).to(dtype).requires_grad_(backward)
        return (x, w_up, w_down, torch.randn_like(x)) if backward else (x, w_up, w_down)

    def ours(x, w_up, w_down):
        return ops.leaky_relu2_mlp(x, w_up, w_down, SLOPE)

    others = {"eager": eager, "torch.compile": torch.compile(eager)} if DEVICE == "cuda" else {"eager": eager}
    call = backward_too(ours) if backward else ours
    call(*make())
    weights, activations = 2 * dim * hidden, tokens * dim
    # Forward: x and weights in, out out. Backward: grad and x and weights in, their gradients out. No hidden tensor.
    elements = 2 * activations + weights + (3 * activations + 2 * weights if backward else 0)
    measure(
        "leaky_relu2_mlp",
        case,
        shape=text(SHAPES.mlp),
        dtype=name(dtype),
        backend=ops.used()["leaky_relu2_mlp"],
        make=make,
        call=call,
        others={key: backward_too(other) if backward else other for key, other in others.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        work=Work(bytes=elements * dtype.itemsize, flops=4 * tokens * dim * hidden * (3 if backward else 1)),
    )
