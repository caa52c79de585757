"""residual_rms_norm against float64, with gradients, registration and hostile input."""

import pytest
import torch
from numerics import DTYPES
from operation_cases import (
    Case,
    check_against_float64,
    check_kept_for_backward,
    check_no_tokens,
    check_one_graph,
    check_zero_strides_and_frozen_inputs,
    leaf,
    rms,
)

from pgolf import ops
from pgolf.ops.residual_rms_norm import residual_rms_norm_reference

SCALE = 0.7


def residual(branch: bool, streams: int, keep_sum: bool = False, dim: int = 48) -> Case:
    def make(dtype, device, tokens):
        tensors = [leaf(tokens, dim, dtype=dtype, device=device) for _ in range(1 + branch + streams)]
        return *tensors, *([leaf(1 + streams, dim, dtype=dtype, device=device)] if streams else [])

    def split(tensors):
        x, others = tensors[0], list(tensors[1:])
        added = others.pop(0) if branch else None
        weights = others.pop() if streams else None
        return x, added, others, weights

    def ours(*tensors):
        if keep_sum:
            return ops.residual_sum_rms_norm(*split(tensors), SCALE)
        return ops.residual_rms_norm(*split(tensors), SCALE)

    def formula(*tensors):
        x, added, others, weights = split(tensors)
        u = x + added if branch else x
        m = u
        if streams:
            m = sum(weight * stream for weight, stream in zip(weights, (u, *others), strict=True))
        return *([u] if keep_sum else []), m, SCALE * m / rms(m)

    return Case("residual_rms_norm", make, ours, formula)


def forms(dim: int) -> dict[str, Case]:
    return {
        "add": residual(True, 0, dim=dim),
        "mix": residual(False, 1, dim=dim),
        "add + mix": residual(True, 1, dim=dim),
        "add + mix + skip": residual(True, 2, dim=dim),
        "add + mix, sum kept": residual(True, 1, keep_sum=True, dim=dim),
        "three streams": residual(False, 3, dim=dim),
    }


CASES, RECORD = forms(48), forms(512)
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@CASE
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_against_float64(case, dtype):
    check_against_float64(case, dtype)


@CASE
def test_gradcheck(case):
    torch.autograd.gradcheck(case.ours, case.make(torch.float64, "cpu", 2), fast_mode=True)


def test_one_graph():
    check_one_graph(CASES["add + mix, sum kept"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


@CASE
def test_no_tokens(case):
    check_no_tokens(case)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("add", 1),  # m, of which the norm's gradient is computed; neither x nor the branch
        ("mix", 2),
        ("add + mix", 3),
        ("add + mix, sum kept", 2),  # the sum in place of its two parts
    ],
)
def test_what_is_kept_for_the_backward_pass(name, kept):
    check_kept_for_backward(CASES[name], kept)


def test_the_definition_is_the_formula():
    x, branch, first, second, weights = inputs = CASES["add + mix + skip"].make(torch.float64, "cpu", 5)
    found = residual_rms_norm_reference(x, branch, [first, second], weights, SCALE)
    torch.testing.assert_close(found, CASES["add + mix + skip"].formula(*inputs))


def test_opcheck():
    x, branch, first, second, weights = CASES["add + mix + skip"].make(torch.float32, "cpu", 6)
    forward, backward = torch.ops.pgolf.residual_rms_norm.default, torch.ops.pgolf.residual_rms_norm_backward.default
    for arguments in (
        (x, branch, first, second, None, weights, 0.7, True, "reference"),
        (x, branch, None, None, None, None, 1.0, False, "reference"),
    ):
        torch.library.opcheck(forward, arguments)
    tensors = [t.detach() for t in (x, branch, first, second, x, branch, first)]
    weights = torch.randn(4, x.shape[1])
    torch.library.opcheck(backward, (*tensors[:4], x.detach(), weights, *tensors[4:], 0.7, "reference"))


def test_one_of_the_results_alone():
    x, branch, stream, weights = inputs = CASES["add + mix"].make(torch.float64, "cpu", 7)
    for index in range(3):
        out = ops.residual_sum_rms_norm(x, branch, [stream], weights)[index]
        found = torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True)
        u = x + branch
        m = weights[0] * u + weights[1] * stream
        truth = (u, m, m * (m.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).rsqrt())[index]
        expected = torch.autograd.grad(truth.sin().sum(), inputs, allow_unused=True)
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if true is None else true)


X, W = torch.zeros(3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(),), TypeError, "x: dtype torch.int32"),
        ((torch.tensor(1.0),), ValueError, "x: a 0-dimensional"),
        ((X, X.half()), TypeError, "branch: dtype torch.float16"),
        ((X, X[:2]), ValueError, r"branch: shape \(2, 4\), expected \(3, 4\)"),
        ((X, None, [X]), ValueError, "weights: expected with streams"),
        ((X, X, [], W), ValueError, "weights: expected with streams"),
        ((X, None, [X, X, X, X], W), ValueError, "streams: 4 are not accepted"),
        ((X, None, [X, X], W), ValueError, r"weights: shape \(2, 4\), expected \(3, 4\)"),
        ((X, None, [X.to("meta")], W), ValueError, r"streams\[0\]: on meta"),
        ((X, None, [], None, float("nan")), ValueError, "scale: nan"),
        ((X, None, [], None, "1"), TypeError, "scale: expected a float, got str"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.residual_rms_norm(*arguments)
