"""two_lane_rms_norm against float64, with gradients, registration and hostile input."""

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
    scalars,
)

from pgolf import ops
from pgolf.ops.two_lane_rms_norm import two_lane_rms_norm_reference

SCALE = 0.7


def two_lanes(lanes: int, branches: int, skip: bool, dim: int = 48) -> Case:
    """`keep` and `post` are one tensor here, as the gate below."""
    wide = lanes + branches + 1 + skip

    def make(dtype, device, tokens):
        tensors = [leaf(tokens, dim, dtype=dtype, device=device) for _ in range(wide)]
        return *tensors, scalars(6, dtype, device), leaf(2 + 2 * skip, dim, dtype=dtype, device=device)

    def split(tensors):
        rows, (keep_and_post, weights) = list(tensors[:-2]), tensors[-2:]
        skips = (rows.pop(), weights[2:]) if skip else (None, None)
        keep, post, x0 = keep_and_post[:2], keep_and_post[2:].view(2, 2), rows.pop()
        return rows[:lanes], rows[lanes:], keep, post, x0, weights[:2], *skips

    def ours(*tensors):
        return ops.two_lane_rms_norm(*split(tensors), SCALE)

    def formula(*tensors):
        rows, added, keep, post, x0, mix, stored, weights = split(tensors)
        a, b = keep[0] * rows[0], keep[1] * rows[-1]
        for j, branch in enumerate(added):
            a, b = a + post[j, 0] * branch, b + post[j, 1] * branch
        if skip:
            a = weights[0] * a + weights[1] * stored
        m = mix[0] * a + mix[1] * x0
        return a, b, SCALE * m / rms(m), SCALE * b / rms(b)

    return Case("two_lane_rms_norm", make, ours, formula, order=0.25)


CASES = {
    "lanes part": two_lanes(1, 1, skip=True),
    "lanes part, nothing to add": two_lanes(1, 0, skip=False),
    "two lanes": two_lanes(2, 2, skip=False),
    "two lanes + skip": two_lanes(2, 2, skip=True),
}
RECORD = {
    "lanes part": two_lanes(1, 1, skip=True, dim=512),
    "two lanes": two_lanes(2, 2, skip=False, dim=512),
    "two lanes + skip": two_lanes(2, 2, skip=True, dim=512),
}
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
    check_one_graph(CASES["two lanes + skip"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


@CASE
def test_no_tokens(case):
    check_no_tokens(case)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("lanes part", 4),
        ("two lanes + skip", 6),
    ],
)
def test_what_is_kept_for_the_backward_pass(name, kept):
    check_kept_for_backward(CASES[name], kept)


def test_the_definition_is_the_formula():
    *rows, scalars, weights = inputs = CASES["two lanes + skip"].make(torch.float64, "cpu", 5)
    lanes, branches, (x0, skip), post = rows[:2], rows[2:4], rows[4:], scalars[2:].view(2, 2)
    arguments = lanes, branches, scalars[:2], post, x0, weights[:2], skip, weights[2:], SCALE
    torch.testing.assert_close(two_lane_rms_norm_reference(*arguments), CASES["two lanes + skip"].formula(*inputs))


@pytest.mark.parametrize("name", ["lanes part, nothing to add", "two lanes + skip"])
def test_opcheck(name):
    *rows, _, _ = (t.detach().requires_grad_() for t in CASES[name].make(torch.float32, "cpu", 6))
    skips = (rows.pop(), torch.randn(2, 48, requires_grad=True)) if "skip" in name else (None, None)
    x0, keep, post = rows.pop(), torch.randn(2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    inputs = rows[:2], rows[2:], keep, post, x0, torch.randn(2, 48, requires_grad=True), *skips
    torch.library.opcheck(torch.ops.pgolf.two_lane_rms_norm.default, (*inputs, 0.7, "reference"))
    upstream = [torch.randn(6, 48) for _ in range(4)]
    plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
    backward = torch.ops.pgolf.two_lane_rms_norm_backward.default
    torch.library.opcheck(backward, (*plain, upstream, 0.7, "reference"))


X, W, SQUARE = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], W[0, :2], SQUARE, X, W), ValueError, "lanes: 0 are not accepted"),
        (([X], [X, X, X], W[0, :2], SQUARE, X, W), ValueError, "branches: 3 are not accepted"),
        (([X, X[:2]], [], W[0, :2], SQUARE, X, W), ValueError, r"lanes\[1\]: shape \(2, 4\)"),
        (([X], [X.half()], W[0, :2], SQUARE, X, W), TypeError, r"branches\[0\]: dtype"),
        (([X], [], W[0], SQUARE, X, W), ValueError, r"keep: shape \(4,\), expected \(2,\)"),
        (([X], [], W[0, :2], W, X, W), ValueError, r"post: shape \(2, 4\), expected \(2, 2\)"),
        (([X], [], W[0, :2], SQUARE, X, X), ValueError, r"mix: shape \(3, 4\)"),
        (([X], [], W[0, :2], SQUARE, X, W.double()), TypeError, "mix: dtype torch.float64"),
        (([X], [], W[0, :2], SQUARE, X, W, X), ValueError, "skip_weights: expected with a skip"),
        (([X], [], W[0, :2], SQUARE, X, W, X.to("meta"), W), ValueError, "skip: on meta"),
        (([X], [], W[0, :2], SQUARE, X.int(), W), TypeError, "x0: dtype torch.int32"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.two_lane_rms_norm(*arguments)
