"""The loss against float64, with gradients, reductions, ignored tokens and hostile input."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, relative_error

from pgolf import ops
from pgolf.ops.softcapped_cross_entropy import softcapped_cross_entropy_reference

SHAPES = [((63,), 100), ((2, 5), 1024), ((1,), 1), ((3, 1, 2), 7)]


def formula(logits, targets, softcap):
    """Losses of tokens, written out from the docstring."""
    capped = softcap * torch.tanh(logits / softcap)
    return torch.log(torch.exp(capped).sum(-1)) - capped.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("softcap", [30.0, 15.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_against_float64(dtype, softcap):
    for tokens, classes in SHAPES:
        logits = (10 * torch.randn(*tokens, classes)).to(dtype).requires_grad_()
        targets = torch.randint(0, classes, tokens)
        upstream = torch.randn(tokens)
        exact = logits.detach().double().requires_grad_()
        truth = formula(exact, targets, softcap)
        (true_grad,) = torch.autograd.grad(truth, exact, upstream.double())
        losses = ops.softcapped_cross_entropy(logits, targets, softcap, reduction="none")
        assert losses.dtype == torch.float32
        assert losses.shape == tokens
        (grad,) = torch.autograd.grad(losses, logits, upstream)
        if classes == 1:
            assert losses.abs().max() < 1e-5
            assert grad.abs().max() < 1e-5
            continue
        assert relative_error(losses.detach(), truth.detach()) < 1e-5, "float32 whatever the dtype of the logits"
        assert relative_error(grad, true_grad) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]


def test_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    for reduction in ("mean", "sum", "none"):
        for function in (softcapped_cross_entropy_reference, ops.softcapped_cross_entropy):
            torch.autograd.gradcheck(lambda x, f=function, r=reduction: f(x, targets, 3.0, r), (logits,))


def test_reductions_ignored_tokens_and_strides():
    logits = torch.randn(3, 4, 11)
    targets = torch.randint(0, 11, (3, 4))
    targets[1, 2] = targets[0, 0] = -1
    kept = targets != -1
    losses = formula(logits.double(), targets.clamp_min(0), 30.0)[kept]
    none = ops.softcapped_cross_entropy(logits, targets, reduction="none", ignore_index=-1)
    assert (none[~kept] == 0).all()
    torch.testing.assert_close(none[kept], losses.float())
    total = ops.softcapped_cross_entropy(logits, targets, reduction="sum", ignore_index=-1)
    torch.testing.assert_close(total, losses.sum().float())
    mean = ops.softcapped_cross_entropy(logits, targets, ignore_index=-1)
    torch.testing.assert_close(mean, losses.mean().float())
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ops.softcapped_cross_entropy(turned, targets.int(), ignore_index=-1), mean)


def test_nothing_to_count():
    for logits, targets in (
        (torch.randn(3, 5), torch.full((3,), -100)),
        (torch.empty(0, 5), torch.empty(0, dtype=torch.int64)),
    ):
        assert math.isnan(ops.softcapped_cross_entropy(logits, targets))
        assert ops.softcapped_cross_entropy(logits, targets, reduction="sum") == 0
        assert ops.softcapped_cross_entropy(logits, targets, reduction="none").shape == targets.shape


def test_a_gradient_with_zero_strides_and_one_that_is_scaled():
    logits = torch.randn(6, 9, requires_grad=True)
    targets = torch.randint(0, 9, (6,))
    losses = ops.softcapped_cross_entropy(logits, targets, reduction="none")
    (ones,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(losses.sum() * -2.5, logits)
    torch.testing.assert_close(scaled, -2.5 * ones)


@given(seed=st.integers(0, 2**31), classes=st.integers(1, 50), spread=st.floats(0.01, 1e4))
@settings(max_examples=40, deadline=None)
def test_probabilities_sum_to_one(seed, classes, spread):
    logits = spread * torch.randn(classes, generator=torch.Generator().manual_seed(seed))
    losses = ops.softcapped_cross_entropy(logits.expand(classes, -1), torch.arange(classes), reduction="none")
    assert torch.exp(-losses.double()).sum().item() == pytest.approx(1, abs=1e-4)
    assert (losses > -1e-5).all()
    assert (losses <= 60 + math.log(classes)).all(), "bounded by twice the softcap"


def test_one_graph():
    compiled = torch.compile(ops.softcapped_cross_entropy, fullgraph=True, backend="aot_eager")
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    torch.testing.assert_close(compiled(logits, targets), ops.softcapped_cross_entropy(logits, targets))
    with pytest.raises(RuntimeError, match=r"outside 0\.\.6"):
        compiled(logits, targets + 7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    compiled = torch.compile(ops.softcapped_cross_entropy, fullgraph=True)
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    loss = compiled(logits, targets)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = ops.softcapped_cross_entropy(logits, targets)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


LOGITS, TARGETS = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS, TARGETS + 5), ValueError, "targets: value 5 is not accepted; accepted are 0..4 and -100"),
        ((LOGITS, TARGETS - 1), ValueError, "targets: value -1"),
        ((LOGITS, TARGETS + 2**40), ValueError, "targets: value"),
        ((LOGITS, TARGETS.float()), TypeError, "targets: dtype torch.float32"),
        ((LOGITS, TARGETS[:2]), ValueError, r"targets: shape \(2,\), expected \(3,\)"),
        ((LOGITS.int(), TARGETS), TypeError, "logits: dtype torch.int32"),
        ((torch.zeros(3, 0), TARGETS), ValueError, r"logits: shape \(3, 0\)"),
        ((LOGITS, TARGETS, 0.0), ValueError, "softcap: 0.0"),
        ((LOGITS, TARGETS, math.inf), ValueError, "softcap: inf"),
        ((LOGITS, TARGETS, None), TypeError, "softcap: expected a float, got NoneType"),
        ((LOGITS, TARGETS, 30.0, "avg"), ValueError, "reduction: 'avg' .* mean, sum, none"),
        ((LOGITS, TARGETS, 30.0, "mean", 0.5), TypeError, "ignore_index"),
        ((LOGITS, TARGETS.to("meta")), ValueError, "targets: on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.softcapped_cross_entropy(*arguments)
