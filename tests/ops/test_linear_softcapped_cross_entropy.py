"""The output layer with its loss: against float64, what it saves, gradients of any factor, registration."""

import importlib
import shutil

import pytest
import torch
from numerics import DTYPES, NO_WORSE, TOLERANCE, need, relative_error
from test_softcapped_cross_entropy import SLACK, saved_values

from pgolf import ops
from pgolf.ops.linear_softcapped_cross_entropy import linear_softcapped_cross_entropy_reference

REDUCTIONS = ("mean", "sum", "none")
# Logits and their gradient are rounded alike here and there, in products of other shapes and so of other order.
ROUNDING = {torch.float32: SLACK, torch.float16: 2e-4, torch.bfloat16: 1e-3}


def random_layer(tokens, classes, width, dtype=torch.float32):
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) * 3 * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (tokens,))
    targets[tokens // 2] = -100
    return hidden, weight, targets


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last of them short."""
    module = importlib.import_module("pgolf.ops.linear_softcapped_cross_entropy")  # the package has a function so named
    monkeypatch.setattr(module, "_chunk_rows", lambda hidden, classes: 5)


@pytest.mark.parametrize("chunks", ["one chunk", "small chunks"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_against_float64_and_plain_pytorch(dtype, reduction, chunks, request):
    if chunks == "small chunks":
        request.getfixturevalue("small_chunks")
    hidden, weight, targets = random_layer(63, 100, 48, dtype)
    upstream = torch.randn(63) if reduction == "none" else torch.tensor(-0.7)
    found = []
    for inputs, function in (
        ((hidden.double(), weight.double()), linear_softcapped_cross_entropy_reference),
        ((hidden, weight), linear_softcapped_cross_entropy_reference),
        ((hidden, weight), ops.linear_softcapped_cross_entropy),
    ):
        inputs = [x.detach().requires_grad_() for x in inputs]
        loss = function(*inputs, targets, 15.0, reduction)
        found.append((loss.detach(), *torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))))
    assert found[2][0].dtype == torch.float32
    for truth, plain, ours in zip(*found, strict=True):
        assert relative_error(ours, truth) < TOLERANCE[dtype]
        assert relative_error(ours, truth) <= NO_WORSE * relative_error(plain, truth) + ROUNDING[dtype]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(reduction):
    hidden, weight, targets = random_layer(7, 6, 4, torch.float64)
    for function in (linear_softcapped_cross_entropy_reference, ops.linear_softcapped_cross_entropy):
        torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, targets, 3.0, reduction), (hidden, weight))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_nothing_of_the_size_of_the_logits_is_saved(reduction):
    tokens, classes, width = 60, 50, 8
    hidden, weight, targets = random_layer(tokens, classes, width)
    hidden, weight = hidden.clone(), weight.clone()
    sizes = saved_values(lambda: ops.linear_softcapped_cross_entropy(hidden, weight, targets, 30.0, reduction))
    assert max(sizes) <= tokens * width
    assert sum(sizes) <= (tokens + classes) * width + 3 * tokens


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_any_gradient_that_arrives_and_a_graph_that_is_kept(reduction):
    hidden, weight, targets = random_layer(12, 9, 4)
    hidden = hidden.detach().reshape(3, 4, 4).transpose(0, 1).requires_grad_()  # strided, with two leading sizes
    targets = targets.reshape(4, 3).int()
    loss = ops.linear_softcapped_cross_entropy(hidden, weight, targets, 5.0, reduction)
    expected = linear_softcapped_cross_entropy_reference(hidden, weight, targets, 5.0, reduction)
    torch.testing.assert_close(loss, expected)
    kept = []
    for factor in (1.0, -2.5, 0.0):
        upstream = torch.full_like(loss, factor)
        found = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected, (hidden, weight), upstream, retain_graph=True), rtol=1e-4, atol=1e-6
        )
        kept.append((found, [x.clone() for x in found]))
    for found, copies in kept:
        assert all(torch.equal(x, copy) for x, copy in zip(found, copies, strict=True))
    found = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, torch.nan))
    assert all(x.isnan().any() for x in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_inputs(reduction):
    hidden, weight, targets = random_layer(6, 9, 4)
    expected = linear_softcapped_cross_entropy_reference(hidden, weight, targets, 30.0, reduction).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for index, inputs in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        loss = ops.linear_softcapped_cross_entropy(*inputs, targets, 30.0, reduction).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, inputs[index])[0], wanted[index])
    assert not ops.linear_softcapped_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_nothing_to_count():
    weight = torch.randn(5, 4, requires_grad=True)
    for tokens in (0, 3):
        hidden, targets = torch.randn(tokens, 4, requires_grad=True), torch.full((tokens,), -100)
        for reduction in REDUCTIONS:
            loss = ops.linear_softcapped_cross_entropy(hidden, weight, targets, 30.0, reduction)
            assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
            for grad in torch.autograd.grad(loss.sum(), (hidden, weight)):
                assert (grad == 0).all()


def test_autocast():
    hidden, weight, targets = random_layer(40, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_softcapped_cross_entropy(hidden, weight, targets)
        expected = linear_softcapped_cross_entropy_reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, y.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.usefixtures("small_chunks")
def test_registration():
    hidden, weight, targets = random_layer(7, 6, 4)
    check, package = torch.library.opcheck, torch.ops.pgolf
    check(package.linear_softcapped_cross_entropy.default, (hidden, weight, targets, 5.0, -100))
    plain = (hidden.detach(), weight.detach(), targets, torch.randn(7), 5.0, -100)
    for wants in ((True, True), (True, False), (False, True)):
        inputs = [x if want else x.detach() for x, want in zip((hidden, weight), wants, strict=True)]
        check(package.linear_softcapped_cross_entropy_gradient.default, (*plain, *wants))
        check(package.linear_softcapped_cross_entropy_total.default, (*inputs, targets, 5.0, -100, *wants))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
        ),
    ],
)
def test_one_graph(backend):
    hidden, weight, targets = random_layer(7, 6, 4)
    for reduction in ("mean", "none"):

        def step(hidden, weight, reduction=reduction):
            return ops.linear_softcapped_cross_entropy(hidden.tanh(), weight, targets, 5.0, reduction) * -2.5

        loss, expected = torch.compile(step, fullgraph=True, backend=backend)(hidden, weight), step(hidden, weight)
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss.sum(), (hidden, weight))
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (hidden, weight)))


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((HIDDEN, WEIGHT, TARGETS + 5), ValueError, "targets: value 5 is not accepted; accepted are 0..4 and -100"),
        ((HIDDEN, WEIGHT, TARGETS[:2]), ValueError, r"targets: shape \(2,\), expected \(3,\)"),
        ((HIDDEN, WEIGHT, TARGETS.float()), TypeError, "targets: dtype torch.float32"),
        ((HIDDEN, WEIGHT.t(), TARGETS), ValueError, r"weight: shape \(4, 5\), expected \(V, 4\)"),
        ((HIDDEN, WEIGHT[0], TARGETS), ValueError, r"weight: shape \(4,\)"),
        ((HIDDEN, WEIGHT.half(), TARGETS), TypeError, "weight: dtype torch.float16, but hidden is torch.float32"),
        ((HIDDEN.int(), WEIGHT, TARGETS), TypeError, "hidden: dtype torch.int32"),
        ((torch.zeros(3, 0), WEIGHT[:, :0], TARGETS), ValueError, r"hidden: shape \(3, 0\)"),
        ((HIDDEN, WEIGHT, TARGETS, 0.0), ValueError, "softcap: 0.0"),
        ((HIDDEN, WEIGHT, TARGETS, 30.0, "avg"), ValueError, "reduction: 'avg' .* mean, sum, none"),
        ((HIDDEN, WEIGHT.to("meta"), TARGETS), ValueError, "weight: on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear_softcapped_cross_entropy(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(dtype, reduction):
    need("linear_softcapped_cross_entropy", "triton", "cuda")
    for shape in ((63, 100, 48), (5000, 8192, 64)):
        hidden, weight, targets = random_layer(*shape, dtype)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        truth = linear_softcapped_cross_entropy_reference(*exact, targets, 15.0, reduction)
        there = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
        loss = ops.linear_softcapped_cross_entropy(*there, targets.cuda(), 15.0, reduction)
        assert relative_error(loss.detach().cpu(), truth.detach()) < TOLERANCE[dtype]
        found, wanted = torch.autograd.grad(loss.sum(), there), torch.autograd.grad(truth.sum(), exact)
        for x, y in zip(found, wanted, strict=True):
            assert relative_error(x.cpu(), y) < TOLERANCE[dtype]
