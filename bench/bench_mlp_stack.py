"""Blocks of norm, feed-forward and residual in a row, forward and backward: the feed-forward block among neighbours.

On CUDA every contender is compiled as one graph, so that what an operation keeps the compiler from fusing is counted.
The CPU runs a few blocks eagerly.
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
LAYERS = 11 if CUDA else 3
SLOPE = 0.5


def eager(x, w_up, w_down):
    return F.linear(F.leaky_relu(F.linear(x, w_up), SLOPE).square(), w_down)


def ours(x, w_up, w_down):
    return ops.leaky_relu2_mlp(x, w_up, w_down, SLOPE)


def stack_of(mlp: Call) -> Call:
    """(x, gradient, pairs of weights...) -> gradients of x and of the weights."""

    def forward(x, *weights):
        for w_up, w_down in zip(weights[::2], weights[1::2], strict=True):
            x = x + mlp(F.rms_norm(x, (x.shape[-1],)), w_up, w_down)
        return x

    stack = torch.compile(forward, fullgraph=True) if CUDA else forward
    return lambda x, grad, *weights: torch.autograd.grad(stack(x, *weights), (x, *weights), grad)


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
def test_mlp_stack(measure, dtype):
    tokens, dim, hidden = SHAPES.mlp

    def make():
        x = torch.randn(tokens, dim, device=DEVICE).to(dtype).requires_grad_()
        weights = []
        for _ in range(LAYERS):
            weights.append((torch.randn(hidden, dim, device=DEVICE) / dim**0.5).to(dtype).requires_grad_())
            weights.append((torch.randn(dim, hidden, device=DEVICE) / hidden**0.5).to(dtype).requires_grad_())
        return x, torch.randn_like(x), *weights

    call = stack_of(ours)
    call(*make())
    peers = contenders("leaky_relu2_mlp", "parameter_golf") if CUDA else {}
    measure(
        "leaky_relu2_mlp stack",
        "forward + backward",
        shape=f"{LAYERS} x {text(SHAPES.mlp)}",
        dtype=name(dtype),
        backend=("compiled, " if CUDA else "") + ops.used()["leaky_relu2_mlp"],
        make=make,
        call=call,
        others={"torch.compile" if CUDA else "eager": stack_of(eager)},
        peers={key: stack_of(peer) for key, peer in peers.items()},
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,  # rounding grows with the layers
        work=Work(
            bytes=(3 * tokens * dim + 4 * LAYERS * dim * hidden) * dtype.itemsize,  # x, gradients and weights once
            flops=12 * LAYERS * tokens * dim * hidden,
        ),
    )
