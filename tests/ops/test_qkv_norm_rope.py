"""qkv_norm_rope against float64, with gradients, registration and hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES
from operation_cases import (
    Case,
    check_against_float64,
    check_one_graph,
    check_zero_strides_and_frozen_inputs,
    kept_for_backward,
    leaf,
    run,
    upstream_of,
)
from test_qk_norm_rope import turned

from pgolf import ops
from pgolf.ops.qkv_norm_rope import qkv_norm_rope_reference


def joined(
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    readers: int = 1,
    extra: int = 0,
    unused: int = 0,
    rows: int = 2,
) -> Case:
    """Queries, keys and values as columns of one tensor."""

    def make(dtype, device, tokens):
        columns = (heads + 2 * kv_heads) * head_dim + extra + unused
        angle = 7 * torch.randn(tokens, half, device=device)
        tables = angle.cos().to(dtype), angle.sin().to(dtype)
        tensors = (leaf(*shape, dtype=dtype, device=device) for shape in ((rows, tokens, columns), (heads,)))
        projected, gain = tensors
        return projected, *tables, gain

    def ours(projected, cos, sin, gain):
        q, k, values, others = ops.qkv_norm_rope(projected, cos, sin, gain, kv_heads, head_dim, readers, extra)
        return q, k, *values, *([others] if extra else [])

    def formula(projected, cos, sin, gain):
        ends = [heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in projected.tensor_split(ends, -1)[:3])
        others = [projected[..., ends[-1] : ends[-1] + extra]] if extra else []
        return turned(q, cos, sin, gain.unsqueeze(-1)), turned(k, cos, sin, 1), *([v] * readers), *others

    return Case("qkv_norm_rope", make, ours, formula, by_row=True)


CASES = {
    "of one product": joined(4, 2, 16, 8),
    "of one product, with gate": joined(3, 1, 20, 4, readers=2, extra=3, unused=2),
}
RECORD = {"qkv": joined(8, 4, 64, 8, readers=2, extra=8, unused=56)}
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
    check_one_graph(CASES["of one product, with gate"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


def test_the_definition_is_the_formula():
    inputs = CASES["of one product, with gate"].make(torch.float64, "cpu", 5)
    q, k, values, extra = qkv_norm_rope_reference(*inputs, 1, 20, readers=2, extra=3)
    torch.testing.assert_close((q, k, *values, extra), CASES["of one product, with gate"].formula(*inputs))


def test_opcheck_of_the_gradients():
    q, k, cos, sin, gain = torch.randn(6, 3, 20), torch.randn(6, 1, 20), *torch.randn(2, 3, 4), torch.randn(3)
    v_grads = [torch.randn_like(k), torch.randn_like(k)]
    tensors = q, k, cos, sin, gain, torch.randn_like(q), torch.randn_like(k), v_grads, torch.randn(6, 2)
    torch.library.opcheck(torch.ops.pgolf.qkv_norm_rope_backward.default, (*tensors, (3 + 2) * 20 + 7, "reference"))


def test_only_the_product_is_kept_and_no_part_copied():
    inputs, (_, _, *views), saved = kept_for_backward(CASES["of one product, with gate"])
    ours = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert saved
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= ours
    assert len(views) == 3
    assert {view.untyped_storage().data_ptr() for view in views} == {inputs[0].untyped_storage().data_ptr()}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes(data):
    heads, kv_heads, head_dim, readers = (data.draw(st.integers(1, n)) for n in (5, 3, 9, 2))
    half, extra, unused = (data.draw(st.integers(0, n)) for n in (head_dim // 2, 4, 4))
    case = joined(heads, kv_heads, head_dim, half, readers, extra, unused)
    inputs = case.make(torch.float64, "cpu", data.draw(st.integers(1, 4)))
    upstream = upstream_of(case, inputs)
    torch.testing.assert_close(run(case.ours, inputs, upstream), run(case.formula, inputs, upstream))


P, TABLE, GAIN = torch.zeros(6, (4 + 2 * 2) * 8 + 3), torch.zeros(3, 4), torch.zeros(4)
W = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((P.int(), TABLE, TABLE, GAIN, 2, 8), TypeError, "projected: dtype torch.int32"),
        ((P.to_sparse(), TABLE, TABLE, GAIN, 2, 8), ValueError, "projected: layout"),
        ((P[0, 0], TABLE, TABLE, GAIN, 2, 8), ValueError, r"projected: shape \(\) .* C >= 64 for 4 "),
        ((P, TABLE, TABLE, GAIN, 3, 8), ValueError, r"projected: shape \(6, 67\) .* C >= 80 for 4 "),
        ((P, TABLE, TABLE, GAIN, 2, 8, 1, 4), ValueError, "C >= 68 .* and 4 extra columns"),
        ((P, TABLE, TABLE, GAIN, 0, 8), ValueError, "kv_heads: 0 is not accepted"),
        ((P, TABLE, TABLE, GAIN, 2, 8.0), TypeError, "head_dim: expected an int, got float"),
        ((P, TABLE, TABLE, GAIN, 2, 8, 3), ValueError, "readers: 3 is not accepted; accepted are 1 to 2"),
        ((P, TABLE, TABLE, GAIN, 2, 8, 1, -1), ValueError, "extra: -1 is not accepted"),
        ((P, TABLE, TABLE, W, 2, 8), ValueError, r"gain: shape \(2, 4\)"),
        ((P, TABLE, TABLE, GAIN.half(), 2, 8), TypeError, "gain: dtype torch.float16"),
        ((P, TABLE.double(), TABLE, GAIN, 2, 8), TypeError, "cos: dtype torch.float64"),
        ((P, TABLE.new_zeros(4, 4), TABLE, GAIN, 2, 8), ValueError, "cos: 4 rows .* 6 tokens"),
        ((P, TABLE, TABLE.to("meta"), GAIN, 2, 8), ValueError, "sin: on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.qkv_norm_rope(*arguments)
