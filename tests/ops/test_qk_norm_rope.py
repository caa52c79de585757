"""qk_norm_rope against float64, with gradients, registration and hostile input."""

import pytest
import torch
from numerics import DTYPES
from operation_cases import (
    Case,
    check_against_float64,
    check_kept_for_backward,
    check_one_graph,
    check_zero_strides_and_frozen_inputs,
    leaf,
    rms,
)
from torch import Tensor

from pgolf import ops
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference


def queries_and_keys(heads: int, kv_heads: int, head_dim: int, half: int, rows: int = 2) -> Case:
    def make(dtype, device, tokens):
        q, k = (leaf(rows, tokens, n, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        angle = 7 * torch.randn(tokens, half, device=device)
        return q, k, angle.cos().to(dtype), angle.sin().to(dtype), leaf(heads, dtype=dtype, device=device)

    def formula(q, k, cos, sin, gain):
        return turned(q, cos, sin, gain.unsqueeze(-1)), turned(k, cos, sin, 1)

    return Case("qk_norm_rope", make, ops.qk_norm_rope, formula, by_row=True)


def turned(x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | int) -> Tensor:
    half, n, c, s = cos.shape[1], x / rms(x), cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = n[..., :half], n[..., half : 2 * half]
    return torch.cat((a * c + b * s, b * c - a * s, n[..., 2 * half :]), -1) * factor


CASES = {"part of a head": queries_and_keys(3, 1, 20, 4), "the whole head": queries_and_keys(4, 2, 16, 8)}
RECORD = {"qk": queries_and_keys(8, 4, 64, 8)}
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
    check_one_graph(CASES["part of a head"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    check_kept_for_backward(CASES["the whole head"], 2)


def test_the_definition_is_the_formula():
    inputs = CASES["part of a head"].make(torch.float64, "cpu", 5)
    torch.testing.assert_close(qk_norm_rope_reference(*inputs), CASES["part of a head"].formula(*inputs))


def test_opcheck():
    q, k, cos, sin, gain = inputs = CASES["part of a head"].make(torch.float32, "cpu", 3)
    q, k = (t.detach().flatten(0, 1).requires_grad_() for t in (q, k))
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope.default, (q, k, *inputs[2:], "reference"))
    tensors = [t.detach() for t in (q, k, cos, sin, gain, q, k)]
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope_backward.default, (*tensors, "reference"))


Q, K, TABLE, GAIN = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.zeros(3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0, 0], K, TABLE, TABLE, GAIN), ValueError, r"q: shape \(8,\)"),
        ((Q, K[:5], TABLE, TABLE, GAIN), ValueError, r"k: shape \(5, 2, 8\), expected \(6, 2, 8\)"),
        ((Q, K.double(), TABLE, TABLE, GAIN), TypeError, "k: dtype torch.float64"),
        ((Q, K, TABLE.new_zeros(4, 4), TABLE, GAIN), ValueError, "cos: 4 rows .* 6 tokens"),
        ((Q, K, TABLE.new_zeros(3, 5), TABLE, GAIN), ValueError, r"cos: shape \(3, 5\)"),
        ((Q, K, TABLE, TABLE[:1], GAIN), ValueError, r"sin: shape \(1, 4\), expected \(3, 4\)"),
        ((Q, K, TABLE, TABLE, GAIN[:2]), ValueError, r"gain: shape \(2,\), expected \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(*arguments)
