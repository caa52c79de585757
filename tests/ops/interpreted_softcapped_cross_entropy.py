"""The Triton kernels of softcapped_cross_entropy under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import math

import pytest
import torch
from numerics import relative_error
from test_softcapped_cross_entropy import GRADIENT_TOLERANCE, formula
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from pgolf import ops
from pgolf.triton_kernels.softcapped_cross_entropy import launch, rescale

DTYPES = (torch.float32, torch.float16)


def truth_of(logits, targets, softcap, upstream):
    """Losses and gradient in float64; targets in range."""
    exact = logits.double().requires_grad_()
    losses = formula(exact, targets, softcap)
    return losses.detach(), torch.autograd.grad(losses, exact, upstream.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 63, 100, 1000, 1024])
@pytest.mark.usefixtures("poisoned")
def test_losses_and_gradient(dtype, classes):
    for softcap in (30.0, 64.0, 1.0):
        logits = (10 * torch.randn(5, classes)).to(dtype).requires_grad_()
        targets, upstream = torch.randint(0, classes, (5,)), torch.randn(5)
        with ops.backend("triton"):
            losses = ops.softcapped_cross_entropy(logits, targets.int(), softcap, "none")
            (gradient,) = torch.autograd.grad(losses, logits, upstream)
        truth, true_gradient = truth_of(logits.detach(), targets, softcap, upstream)
        if classes == 1:
            assert losses.abs().max() < 1e-5
            assert gradient.abs().max() < 1e-5
            continue
        assert relative_error(losses.detach(), truth) < 1e-5
        assert relative_error(gradient, true_gradient) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [150, 512])
@pytest.mark.usefixtures("poisoned")
def test_rows_longer_than_a_block_and_in_place(dtype, classes):
    logits, targets = (10 * torch.randn(4, classes)).to(dtype), torch.randint(0, classes, (4,))
    scale, losses = torch.randn(4), torch.empty(4)
    truth, true_gradient = truth_of(logits, targets, 30.0, scale)
    for gradient in (torch.empty_like(logits), logits):
        launch(logits, targets, losses, 30.0, -100, scale, gradient, largest_block=64)
        assert relative_error(losses, truth) < 1e-5
        assert relative_error(gradient, true_gradient) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_total_and_its_backward(reduction):
    logits, targets = torch.randn(6, 70, requires_grad=True), torch.randint(0, 70, (6,))
    targets[2] = -100
    with ops.backend("reference"):
        (expected,) = torch.autograd.grad(ops.softcapped_cross_entropy(logits, targets, 30.0, reduction), logits)
    for factor in (1.0, -2.5):
        with ops.backend("triton"):
            total = ops.softcapped_cross_entropy(logits, targets, 30.0, reduction)
            (gradient,) = torch.autograd.grad(total * factor, logits)
        torch.testing.assert_close(gradient, factor * expected, atol=1e-6, rtol=1e-5)
        assert (gradient[2] == 0).all()


def test_linear():
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(66, 5, requires_grad=True)
    targets = torch.randint(0, 66, (7,))
    results = []
    for backend in ("reference", "triton"):
        with ops.backend(backend):
            loss = ops.linear_softcapped_cross_entropy(hidden, weight, targets, 15.0)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("largest_block", [64, 128])
def test_ignored_rows_infinities_and_nan(largest_block):
    logits, targets = torch.randn(5, 100), torch.tensor([3, -100, 99, 1, 0])
    logits[1] = torch.nan
    logits[2, :2], logits[2, 99] = torch.inf, -torch.inf
    logits[3, 50] = torch.nan
    logits[4] = -torch.inf
    losses, gradient, scale = torch.empty(5), torch.empty(5, 100), torch.ones(1)
    scale[0] = 2.0
    launch(logits, targets, losses, 30.0, -100, scale, gradient, largest_block)
    assert losses[1] == 0
    assert (gradient[1] == 0).all()
    assert losses[2] == pytest.approx(60 + math.log(2), rel=1e-6)
    assert gradient[2, [0, 1, 99]].abs().max() < 1e-15
    assert losses[3].isnan()
    assert gradient[3].isnan().all()
    assert losses[4] == pytest.approx(math.log(100), rel=1e-6)
    assert (gradient[4] == 0).all()
    launch(logits[1:2], targets[1:2], losses[:1], 30.0, -100, torch.full((1,), torch.nan), gradient[:1])
    assert (gradient[0] == 0).all(), "whatever the scale"


def test_nothing_outside_is_touched():
    memory, losses = torch.full((5, 90), torch.nan), torch.full((5,), torch.nan)
    logits, targets = torch.randn(3, 90)[:, 10:80], torch.tensor([0, 69, -100])
    gradient = memory[1:4, 10:80]  # rows apart, as are those of the logits
    launch(logits, targets, losses[1:4], 30.0, -100, torch.ones(3), gradient)
    assert gradient.isfinite().all()
    assert losses[1:4].isfinite().all()
    gradient.fill_(torch.nan)
    losses[1:4] = torch.nan
    assert memory.isnan().all()
    assert losses.isnan().all()
    launch(logits, targets, losses[1:4], 30.0, -100)
    assert memory.isnan().all(), "without a gradient only losses are written"


@pytest.mark.parametrize("target", [70, -1, 2**40, -(2**40)])
def test_a_target_out_of_range_is_asserted_and_never_an_address(target, monkeypatch):
    # The interpreter takes no options from a launch, and without them leaves assertions out.
    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True, sanitize_overflow=False))
    logits, losses = torch.randn(1, 70), torch.empty(1)
    with pytest.raises(InterpreterError, match=r"a target is outside 0..V-1 and is not ignore_index"):
        launch(logits, torch.tensor([target]), losses, 30.0, -100, torch.ones(1), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale(dtype):
    tensor = torch.randn(3, 5000).to(dtype)
    before = tensor.clone()
    rescale(tensor, torch.tensor(1.0))
    assert torch.equal(tensor, before)
    rescale(tensor, torch.tensor(-2.5))
    assert torch.equal(tensor, (before.float() * -2.5).to(dtype))
    rescale(tensor, torch.tensor(torch.nan))
    assert tensor.isnan().all()
