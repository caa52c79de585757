"""xsa_gate against float64, with gradients, registration and hostile input."""

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
)

from pgolf import ops
from pgolf.ops.xsa_gate import xsa_gate_reference


def exclusive(gate: bool, heads: int, kv_heads: int, head_dim: int) -> Case:
    def make(dtype, device, tokens):
        y, v = (leaf(tokens, n, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        return y, v, *([leaf(tokens, heads, dtype=dtype, device=device)] if gate else [])

    def ours(y, v, logits=None):
        return (ops.xsa_gate(y, v, logits, 2.0, 0.5),)

    def formula(y, v, logits=None):
        u = (v / v.square().sum(-1, keepdim=True).sqrt()).repeat_interleave(heads // kv_heads, -2)
        out = y - (y * u).sum(-1, keepdim=True) * u
        return (out if logits is None else out * (2 / (1 + torch.exp(-0.5 * logits))).unsqueeze(-1),)

    return Case("xsa_gate", make, ours, formula)


CASES = {"xsa": exclusive(False, 4, 2, 24), "xsa + gate": exclusive(True, 6, 2, 24)}
RECORD = {"xsa + gate": exclusive(True, 8, 4, 64)}
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
    check_one_graph(CASES["xsa + gate"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


@CASE
def test_no_tokens(case):
    check_no_tokens(case)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    check_kept_for_backward(CASES["xsa"], 2)


def test_the_definition_is_the_formula():
    inputs = CASES["xsa + gate"].make(torch.float64, "cpu", 5)
    torch.testing.assert_close((xsa_gate_reference(*inputs, 2.0, 0.5),), CASES["xsa + gate"].formula(*inputs))


def test_opcheck():
    y, v, logits = CASES["xsa + gate"].make(torch.float32, "cpu", 6)
    torch.library.opcheck(torch.ops.pgolf.xsa_gate.default, (y, v, logits, 2.0, 0.5, "reference"))
    tensors = [t.detach() for t in (y, v, logits, y)]
    torch.library.opcheck(torch.ops.pgolf.xsa_gate_backward.default, (*tensors, 2.0, 0.5, "reference"))


Q, K, GAIN = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q, Q[:, :3]), ValueError, "with kv_heads a divisor of 4"),
        ((Q, K[:2]), ValueError, r"v: shape \(2, 2, 8\), expected \(6, 2, 8\)"),
        ((Q, K, GAIN), ValueError, r"logits: shape \(4,\), expected \(6, 4\)"),
        ((Q, K, Q[..., 0].bfloat16()), TypeError, "logits: dtype torch.bfloat16"),
        ((Q, K, None, float("inf")), ValueError, "gain: inf"),
        ((Q.to_sparse(), K), ValueError, "y: layout"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.xsa_gate(*arguments)
