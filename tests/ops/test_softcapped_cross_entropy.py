"""The loss against float64, with gradients, reductions, ignored tokens and hostile input."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, NO_WORSE, need, relative_error

from pgolf import ops
from pgolf.ops.softcapped_cross_entropy import softcapped_cross_entropy_reference

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}
# c - 2c·r carries the rounding of r near 1/2 into every capped logit; tanh, which costs ten times as much, does not.
SLACK = 1e-6
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
        assert relative_error(grad, true_grad) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [30.0, 200.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_pytorch(dtype, softcap, reduction):
    values, targets = (10 * torch.randn(700, 1000)).to(dtype), torch.randint(0, 1000, (700,))
    upstream = torch.randn(700) if reduction == "none" else torch.tensor(-2.0)
    found = []
    for logits, function in (
        (values.double(), softcapped_cross_entropy_reference),
        (values, softcapped_cross_entropy_reference),
        (values, ops.softcapped_cross_entropy),
    ):
        logits = logits.detach().requires_grad_()
        loss = function(logits, targets, softcap, reduction)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits, upstream.to(loss.dtype))))
    for truth, plain, ours in zip(*found, strict=True):
        assert relative_error(ours, truth) <= NO_WORSE * relative_error(plain, truth) + SLACK


def test_small_losses_keep_their_digits():
    logits = torch.zeros(50, 40)
    logits[:, 7] = torch.linspace(5, 25, 50)
    targets = torch.full((50,), 7)
    truth = formula(logits.double(), targets, 30.0)
    losses = ops.softcapped_cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=3e-7)


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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_gradient_that_arrives_and_a_graph_that_is_kept(dtype, reduction):
    logits = torch.randn(5, 8).to(dtype).requires_grad_()
    targets = torch.tensor([0, 7, -100, 3, 3])
    expected = softcapped_cross_entropy_reference(logits, targets, 5.0, reduction)
    loss = ops.softcapped_cross_entropy(logits, targets, 5.0, reduction)
    factors = (1.0, -2.5, 0.0, math.inf, math.nan, 0.3)
    kept = []
    for factor in factors:
        last = factor == factors[-1]
        upstream = torch.full_like(loss, factor)
        (grad,) = torch.autograd.grad(loss, logits, upstream, retain_graph=not last)
        (want,) = torch.autograd.grad(expected, logits, upstream, retain_graph=True)
        kept.append((grad, grad.clone()))
        if math.isfinite(factor):
            torch.testing.assert_close(grad, want, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-5)
        else:
            assert (grad[[0, 1, 3, 4]].isfinite() == want[[0, 1, 3, 4]].isfinite()).all()
    for grad, copy in kept:
        torch.testing.assert_close(grad, copy, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits, torch.ones_like(loss))


def test_scaled_float16_gradients_do_not_vanish():
    logits = torch.randn(4096, 50).half().requires_grad_()
    targets = torch.randint(0, 50, (4096,))
    (grad,) = torch.autograd.grad(ops.softcapped_cross_entropy(logits, targets) * 65536, logits)
    exact = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(softcapped_cross_entropy_reference(exact, targets) * 65536, exact)
    assert relative_error(grad, truth) < GRADIENT_TOLERANCE[torch.float16]


def saved_values(function) -> list[int]:
    """Sizes of the distinct memory that autograd keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return list(kept.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_at_most_one_tensor_as_large_as_the_logits_is_saved(reduction):
    source, targets = torch.randn(30, 40, requires_grad=True), torch.randint(0, 40, (30,))
    logits = source.clone()
    sizes = saved_values(lambda: ops.softcapped_cross_entropy(logits, targets, reduction=reduction))
    assert sizes.count(1200) == 1
    assert sum(sizes) <= 1200 + 3 * 30


def test_frozen_and_strided_logits():
    targets = torch.randint(0, 6, (4,))
    loss = ops.softcapped_cross_entropy(torch.randn(4, 6), targets)
    assert not loss.requires_grad
    source = torch.randn(6, 9, requires_grad=True)
    for logits in (source.t()[:4], source[:4, 2:8], source[:1, :6].expand(4, 6), source[::2, :6][[0, 1, 2, 0]]):
        for reduction in ("mean", "none"):
            loss = ops.softcapped_cross_entropy(logits, targets, 5.0, reduction)
            expected = softcapped_cross_entropy_reference(logits, targets, 5.0, reduction)
            upstream = torch.ones_like(loss)
            (grad,) = torch.autograd.grad(loss, source, upstream, retain_graph=True)
            (want,) = torch.autograd.grad(expected, source, upstream, retain_graph=True)
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("softcap", [30.0, 100.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_infinities_and_nan(reduction, softcap):
    values, targets = torch.randn(5, 100), torch.tensor([3, -100, 99, 1, 0])
    values[1] = torch.nan
    values[2, :2], values[2, 99] = torch.inf, -torch.inf
    values[4] = -torch.inf
    for bad in (False, True):
        values[3, 50] = torch.nan if bad else 0.0
        logits = values.clone().requires_grad_()
        loss = ops.softcapped_cross_entropy(logits, targets, softcap, reduction)
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert (grad[1] == 0).all()
        assert grad[2, [0, 1, 99]].abs().max() < 1e-15
        assert (grad[4] == 0).all()
        assert grad[3].isnan().all() == bad
        if reduction == "none":
            assert loss[1] == 0
            assert loss[2].item() == pytest.approx(2 * softcap + math.log(2), rel=1e-5)
            assert loss[4].item() == pytest.approx(math.log(100), rel=1e-5)
            assert loss[3].isnan() == bad


def test_registration():
    logits = torch.randn(5, 7, requires_grad=True)
    targets, scale = torch.tensor([0, 6, -100, 2, 2]), torch.randn(5)
    plain = logits.detach()
    check = torch.library.opcheck
    check(torch.ops.pgolf.softcapped_cross_entropy.default, (logits, targets, 5.0, -100))
    check(torch.ops.pgolf.softcapped_cross_entropy_gradient.default, (plain, targets, scale, 5.0, -100))
    check(torch.ops.pgolf.softcapped_cross_entropy_gradient.default, (plain.half(), targets, scale[:1], 90.0, -100))
    for mean in (False, True):
        check(torch.ops.pgolf.softcapped_cross_entropy_total.default, (logits, targets, mean, 5.0, -100))
    check(torch.ops.pgolf.rescale_.default, (plain.clone(), torch.tensor(2.0)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_and_not_wrong(reduction):
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    targets = torch.randint(0, 6, (4,))
    for loss in (
        ops.softcapped_cross_entropy(hidden @ weight.t(), targets, reduction=reduction),
        ops.linear_softcapped_cross_entropy(hidden, weight, targets, reduction=reduction),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
            torch.autograd.grad(loss.sum(), hidden, create_graph=True)


def test_the_registered_operation_checks_for_itself():
    with pytest.raises(ValueError, match=r"targets: shape \(2,\), expected \(3,\)"):
        torch.ops.pgolf.softcapped_cross_entropy(LOGITS, TARGETS[:2], 30.0, -100)
    with pytest.raises(ValueError, match=r"scale: shape \(2,\)"):
        torch.ops.pgolf.softcapped_cross_entropy_gradient(LOGITS, TARGETS, torch.ones(2), 30.0, -100)
    with pytest.raises(TypeError, match=r"scale: dtype torch\.float64"):
        torch.ops.pgolf.softcapped_cross_entropy_gradient(LOGITS, TARGETS, torch.ones(3).double(), 30.0, -100)


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
    loss, expected = compiled(logits, targets), ops.softcapped_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss * -2.5, logits)
    torch.testing.assert_close(grad, torch.autograd.grad(expected * -2.5, logits)[0])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("poisoned")
def test_on_the_gpu(dtype, reduction):
    need("softcapped_cross_entropy", "triton", "cuda")
    for tokens, classes in ((63, 100), (1000, 1024), (257, 8192), (65, 8191), (33, 20000), (5, 1)):
        logits = (10 * torch.randn(tokens, classes)).to(dtype).requires_grad_()
        targets = torch.randint(0, classes, (tokens,))
        targets[tokens // 2] = -100
        exact = logits.detach().double().requires_grad_()
        truth = softcapped_cross_entropy_reference(exact, targets, 30.0, reduction)
        upstream = torch.randn(truth.shape)
        (true_grad,) = torch.autograd.grad(truth, exact, upstream.double())
        there = logits.detach().cuda().requires_grad_()
        loss = ops.softcapped_cross_entropy(there, targets.cuda(), 30.0, reduction)
        (grad,) = torch.autograd.grad(loss, there, upstream.cuda())
        if classes == 1:
            assert loss.abs().max() < 1e-5
            assert grad.abs().max() < 1e-5
            continue
        assert relative_error(loss.detach().cpu(), truth.detach()) < 1e-5
        assert relative_error(grad.cpu(), true_grad) < GRADIENT_TOLERANCE[dtype]
    assert ops.used()["softcapped_cross_entropy"] == "triton"
