"""The feed-forward block, beside plain PyTorch, eager and (on CUDA) compiled, and beside the peers' kernels on CUDA.

parameter-golf's kernel has slope 0.5, modded-nanogpt's is relu²: each is measured where it computes the same thing.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.measure import Call, Work
from bench.harness.shapes import SHAPES, name, text
from bench.peers import contenders
from pgolf import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SLOPE = 0.5
TOKENS, DIM, HIDDEN = SHAPES.mlp


def eager(x, w_up, w_down):
    return F.linear(F.leaky_relu(F.linear(x, w_up), SLOPE).square(), w_down)


def eager_relu2(x, w_up, w_down):
    return F.linear(F.relu(F.linear(x, w_up)).square(), w_down)


def backward_too(mlp: Call) -> Call:
    def run(x, w_up, w_down, grad):
        return torch.autograd.grad(mlp(x, w_up, w_down), (x, w_up, w_down), grad)

    return run


def others(mlp: Call) -> dict[str, Call]:
    return {"eager": mlp, "torch.compile": torch.compile(mlp)} if CUDA else {"eager": mlp}


def random_inputs(dtype: torch.dtype, backward: bool) -> tuple[Tensor, ...]:
    """x, w_up and w_down; with `backward` also the gradient of the result."""
    x = torch.randn(TOKENS, DIM, device=DEVICE).to(dtype).requires_grad_(backward)
    w_up = (torch.randn(HIDDEN, DIM, device=DEVICE) / DIM**0.5).to(dtype).requires_grad_(backward)
    w_down = (torch.randn(DIM, HIDDEN, device=DEVICE) / HIDDEN**0.5).to(dtype).requires_grad_(backward)
    return (x, w_up, w_down, torch.randn_like(x)) if backward else (x, w_up, w_down)


def work(dtype: torch.dtype, backward: bool) -> Work:
    weights, activations = 2 * DIM * HIDDEN, TOKENS * DIM
    # Forward: x and weights in, out out. Backward: grad and x and weights in, their gradients out. No hidden tensor.
    elements = 2 * activations + weights + (3 * activations + 2 * weights if backward else 0)
    return Work(bytes=elements * dtype.itemsize, flops=4 * TOKENS * DIM * HIDDEN * (3 if backward else 1))


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("case", ["forward", "forward + backward"])
def test_leaky_relu2_mlp(measure, case, dtype):
    backward = case != "forward"
    wrap = backward_too if backward else lambda mlp: mlp

    def ours(x, w_up, w_down):
        return ops.leaky_relu2_mlp(x, w_up, w_down, SLOPE)

    call = wrap(ours)
    call(*random_inputs(dtype, backward))
    peers = contenders("leaky_relu2_mlp", "parameter_golf") if CUDA else {}
    measure(
        "leaky_relu2_mlp",
        case,
        shape=text(SHAPES.mlp),
        dtype=name(dtype),
        backend=ops.used()["leaky_relu2_mlp"],
        make=lambda: random_inputs(dtype, backward),
        call=call,
        others={key: wrap(other) for key, other in others(eager).items()},
        peers={key: wrap(other) for key, other in peers.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        work=work(dtype, backward),
    )


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
def test_relu2_mlp(measure, dtype):
    """Slope 0. The peer stores w_down transposed and gets it that way, so that nobody pays for a transposition."""

    def make():
        x, w_up, w_down, grad = random_inputs(dtype, backward=True)
        return x, w_up, w_down, grad, w_down.detach().mT.contiguous().requires_grad_()

    def ignoring_the_last(mlp: Call) -> Call:
        run = backward_too(mlp)
        return lambda x, w_up, w_down, grad, _: run(x, w_up, w_down, grad)

    def transposed(mlp: Call) -> Call:
        def run(x, w_up, _, grad, w_down_t):
            grad_x, grad_up, grad_down_t = torch.autograd.grad(mlp(x, w_up, w_down_t), (x, w_up, w_down_t), grad)
            return grad_x, grad_up, grad_down_t.mT

        return run

    call = ignoring_the_last(lambda x, w_up, w_down: ops.leaky_relu2_mlp(x, w_up, w_down, 0.0))
    call(*make())
    peers = contenders("relu2_mlp", "modded_nanogpt") if CUDA else {}
    measure(
        "leaky_relu2_mlp",
        "relu², forward + backward",
        shape=text(SHAPES.mlp),
        dtype=name(dtype),
        backend=ops.used()["leaky_relu2_mlp"],
        make=make,
        call=call,
        others={key: ignoring_the_last(other) for key, other in others(eager_relu2).items()},
        peers={key: transposed(other) for key, other in peers.items()},
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        work=work(dtype, backward=True),
    )
