"""The operations between the matrix products against float64, with gradients, registration and hostile input."""

import pytest
import torch
from glue_cases import BY_ROW, CASES, exactly, joined, run, upstream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_no_worse

from pgolf import ops
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference
from pgolf.ops.qkv_norm_rope import qkv_norm_rope_reference
from pgolf.ops.residual_rms_norm import residual_rms_norm_reference
from pgolf.ops.two_lane_rms_norm import two_lane_rms_norm_reference
from pgolf.ops.xsa_gate import xsa_gate_reference

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@CASE
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_against_float64(case, dtype):
    inputs = case.make(dtype, "cpu", 200)
    upstream = upstream_of(case, inputs)
    mine, plain = run(case.ours, inputs, upstream), run(case.formula, inputs, upstream)
    for found, plainly, true in zip(mine, plain, run(case.formula, exactly(inputs), upstream), strict=True):
        assert found.dtype == dtype
        assert_no_worse(found, plainly, true, case.order)


@CASE
def test_gradcheck(case):
    inputs = case.make(torch.float64, "cpu", 2)
    torch.autograd.gradcheck(case.ours, inputs, fast_mode=True)


def test_the_definitions_are_the_formulas():
    x, branch, first, second, weights = inputs = CASES["add + mix + skip"].make(torch.float64, "cpu", 5)
    found = [residual_rms_norm_reference(x, branch, [first, second], weights, 0.7)]
    expected = [CASES["add + mix + skip"].formula(*inputs)]
    inputs = CASES["part of a head"].make(torch.float64, "cpu", 5)
    found.append(qk_norm_rope_reference(*inputs))
    expected.append(CASES["part of a head"].formula(*inputs))
    inputs = CASES["of one product, with gate"].make(torch.float64, "cpu", 5)
    q, k, values, extra = qkv_norm_rope_reference(*inputs, 1, 20, readers=2, extra=3)
    found.append((q, k, *values, extra))
    expected.append(CASES["of one product, with gate"].formula(*inputs))
    inputs = CASES["xsa + gate"].make(torch.float64, "cpu", 5)
    found.append(xsa_gate_reference(*inputs, 2.0, 0.5))
    expected.append(CASES["xsa + gate"].formula(*inputs)[0])
    *rows, scalars, weights = inputs = CASES["two lanes + skip"].make(torch.float64, "cpu", 5)
    lanes, branches, (x0, skip), post = rows[:2], rows[2:4], rows[4:], scalars[2:].view(2, 2)
    arguments = lanes, branches, scalars[:2], post, x0, weights[:2], skip, weights[2:], 0.7
    found.append(two_lane_rms_norm_reference(*arguments))
    expected.append(CASES["two lanes + skip"].formula(*inputs))
    table, tokens, gate, starts = inputs = CASES["embedding"].make(torch.float64, "cpu", 5)
    found.append(embedding_smear_norm_reference(tokens, table, gate[None, :-1], gate[-1:], starts))
    expected.append(CASES["embedding"].formula(*inputs)[0])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        *("add + mix, sum kept", "part of a head", "of one product, with gate", "xsa + gate"),
        *("two lanes + skip", "embedding"),
    ],
)
def test_one_graph(name):
    case = CASES[name]
    inputs = case.make(torch.float32, "cpu", 6)
    upstream = upstream_of(case, inputs)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs, upstream), run(case.ours, inputs, upstream))


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
    q, k, cos, sin, gain = inputs = CASES["part of a head"].make(torch.float32, "cpu", 3)
    q, k = (t.detach().flatten(0, 1).requires_grad_() for t in (q, k))
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope.default, (q, k, *inputs[2:], "reference"))
    tensors = [t.detach() for t in (q, k, cos, sin, gain, q, k)]
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope_backward.default, (*tensors, "reference"))
    both = [torch.randn_like(k), torch.randn_like(k)]
    arguments = (*tensors, both, torch.randn(len(q), 2), (3 + 2) * 20 + 7, "reference")
    torch.library.opcheck(torch.ops.pgolf.qkv_norm_rope_backward.default, arguments)
    y, v, logits = CASES["xsa + gate"].make(torch.float32, "cpu", 6)
    torch.library.opcheck(torch.ops.pgolf.xsa_gate.default, (y, v, logits, 2.0, 0.5, "reference"))
    tensors = [t.detach() for t in (y, v, logits, y)]
    torch.library.opcheck(torch.ops.pgolf.xsa_gate_backward.default, (*tensors, 2.0, 0.5, "reference"))
    for name in ("lanes part, nothing to add", "two lanes + skip"):
        *rows, _, weights = (t.detach().requires_grad_() for t in CASES[name].make(torch.float32, "cpu", 6))
        skips = (rows.pop(), torch.randn(2, 48, requires_grad=True)) if "skip" in name else (None, None)
        x0, keep, post = rows.pop(), torch.randn(2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
        inputs = rows[:2], rows[2:], keep, post, x0, torch.randn(2, 48, requires_grad=True), *skips
        torch.library.opcheck(torch.ops.pgolf.two_lane_rms_norm.default, (*inputs, 0.7, "reference"))
        upstream = [torch.randn(6, 48) for _ in range(4)]
        plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
        backward = torch.ops.pgolf.two_lane_rms_norm_backward.default
        torch.library.opcheck(backward, (*plain, upstream, 0.7, "reference"))
    table, tokens, gate, starts = CASES["embedding"].make(torch.float32, "cpu", 6)
    gate = gate.detach()
    tensors = tokens, table, gate[None, :-1].requires_grad_(), gate[-1:].clone().requires_grad_(), starts
    torch.library.opcheck(torch.ops.pgolf.embedding_smear_norm.default, (*tensors, "reference"))
    tensors = [*(t.detach() for t in tensors), torch.randn(*tokens.shape, table.shape[1])]
    torch.library.opcheck(torch.ops.pgolf.embedding_smear_norm_backward.default, (*tensors, "reference"))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("add", 1),  # m, of which the norm's gradient is computed; neither x nor the branch
        ("mix", 2),
        ("add + mix", 3),
        ("add + mix, sum kept", 2),  # the sum in place of its two parts
        ("xsa", 2),
        ("lanes part", 4),
        ("two lanes + skip", 6),
        ("the whole head", 2),
    ],
)
def test_what_is_kept_for_the_backward_pass(name, kept):
    case, saved = CASES[name], []
    inputs = case.make(torch.float32, "cpu", 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.ours(*inputs)
    assert sum(tensor.numel() >= inputs[1].numel() for tensor in saved) == kept


def test_of_one_product_nothing_else_is_kept_and_no_part_copied():
    case, saved = CASES["of one product, with gate"], []
    inputs = case.make(torch.float32, "cpu", 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, _, *views = case.ours(*inputs)
    ours = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert saved
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= ours
    assert len(views) == 3
    assert {view.untyped_storage().data_ptr() for view in views} == {inputs[0].untyped_storage().data_ptr()}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_of_one_product_any_sizes(data):
    heads, kv_heads, head_dim, readers = (data.draw(st.integers(1, n)) for n in (5, 3, 9, 2))
    half, extra, unused = (data.draw(st.integers(0, n)) for n in (head_dim // 2, 4, 4))
    case = joined(heads, kv_heads, head_dim, half, readers, extra, unused)
    inputs = case.make(torch.float64, "cpu", data.draw(st.integers(1, 4)))
    upstream = upstream_of(case, inputs)
    torch.testing.assert_close(run(case.ours, inputs, upstream), run(case.formula, inputs, upstream))


def test_no_embedding_is_kept():
    case, saved = CASES["embedding"], []
    inputs = case.make(torch.float32, "cpu", 200)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (out,) = case.ours(*inputs)
    assert max(tensor.numel() for tensor in saved) == inputs[0].numel() < out.numel() / 10


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    inputs = case.make(torch.float32, "cpu", 7)
    outs = case.ours(*inputs)
    expected = torch.autograd.grad(outs, inputs[0], [torch.ones_like(out) for out in outs])
    frozen = (inputs[0], *(t.detach() for t in inputs[1:]))
    found = torch.autograd.grad(sum(out.sum() for out in case.ours(*frozen)), inputs[0])
    torch.testing.assert_close(found, expected)
    empty = tuple(t[:0] if t.shape[:1] == (7,) else t for t in inputs)
    if case.operation not in BY_ROW:
        assert all(out.shape[0] == 0 for out in case.ours(*empty))


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


X, W, SQUARE, ONE = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(1)
TOKENS, STARTS = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.bool)
Q, K, TABLE, GAIN = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.zeros(3, 4), torch.zeros(4)
P = torch.zeros(6, (4 + 2 * 2) * 8 + 3)


@pytest.mark.parametrize(
    ("operation", "arguments", "error", "message"),
    [
        ("residual_rms_norm", (X.int(),), TypeError, "x: dtype torch.int32"),
        ("residual_rms_norm", (torch.tensor(1.0),), ValueError, "x: a 0-dimensional"),
        ("residual_rms_norm", (X, X.half()), TypeError, "branch: dtype torch.float16"),
        ("residual_rms_norm", (X, X[:2]), ValueError, r"branch: shape \(2, 4\), expected \(3, 4\)"),
        ("residual_rms_norm", (X, None, [X]), ValueError, "weights: expected with streams"),
        ("residual_rms_norm", (X, X, [], W), ValueError, "weights: expected with streams"),
        ("residual_rms_norm", (X, None, [X, X, X, X], W), ValueError, "streams: 4 are not accepted"),
        ("residual_rms_norm", (X, None, [X, X], W), ValueError, r"weights: shape \(2, 4\), expected \(3, 4\)"),
        ("residual_rms_norm", (X, None, [X.to("meta")], W), ValueError, r"streams\[0\]: on meta"),
        ("residual_rms_norm", (X, None, [], None, float("nan")), ValueError, "scale: nan"),
        ("residual_rms_norm", (X, None, [], None, "1"), TypeError, "scale: expected a float, got str"),
        ("qk_norm_rope", (Q[0, 0], K, TABLE, TABLE, GAIN), ValueError, r"q: shape \(8,\)"),
        ("qk_norm_rope", (Q, K[:5], TABLE, TABLE, GAIN), ValueError, r"k: shape \(5, 2, 8\), expected \(6, 2, 8\)"),
        ("qk_norm_rope", (Q, K.double(), TABLE, TABLE, GAIN), TypeError, "k: dtype torch.float64"),
        ("qk_norm_rope", (Q, K, TABLE.new_zeros(4, 4), TABLE, GAIN), ValueError, "cos: 4 rows .* 6 tokens"),
        ("qk_norm_rope", (Q, K, TABLE.new_zeros(3, 5), TABLE, GAIN), ValueError, r"cos: shape \(3, 5\)"),
        ("qk_norm_rope", (Q, K, TABLE, TABLE[:1], GAIN), ValueError, r"sin: shape \(1, 4\), expected \(3, 4\)"),
        ("qk_norm_rope", (Q, K, TABLE, TABLE, GAIN[:2]), ValueError, r"gain: shape \(2,\), expected \(4,\)"),
        ("qkv_norm_rope", (P.int(), TABLE, TABLE, GAIN, 2, 8), TypeError, "projected: dtype torch.int32"),
        ("qkv_norm_rope", (P.to_sparse(), TABLE, TABLE, GAIN, 2, 8), ValueError, "projected: layout"),
        ("qkv_norm_rope", (P[0, 0], TABLE, TABLE, GAIN, 2, 8), ValueError, r"projected: shape \(\) .* C >= 64 for 4 "),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN, 3, 8), ValueError, r"projected: shape \(6, 67\) .* C >= 80 for 4 "),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN, 2, 8, 1, 4), ValueError, "C >= 68 .* and 4 extra columns"),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN, 0, 8), ValueError, "kv_heads: 0 is not accepted"),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN, 2, 8.0), TypeError, "head_dim: expected an int, got float"),
        (
            "qkv_norm_rope",
            (P, TABLE, TABLE, GAIN, 2, 8, 3),
            ValueError,
            "readers: 3 is not accepted; accepted are 1 to 2",
        ),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN, 2, 8, 1, -1), ValueError, "extra: -1 is not accepted"),
        ("qkv_norm_rope", (P, TABLE, TABLE, W, 2, 8), ValueError, r"gain: shape \(2, 4\)"),
        ("qkv_norm_rope", (P, TABLE, TABLE, GAIN.half(), 2, 8), TypeError, "gain: dtype torch.float16"),
        ("qkv_norm_rope", (P, TABLE.double(), TABLE, GAIN, 2, 8), TypeError, "cos: dtype torch.float64"),
        ("qkv_norm_rope", (P, TABLE.new_zeros(4, 4), TABLE, GAIN, 2, 8), ValueError, "cos: 4 rows .* 6 tokens"),
        ("qkv_norm_rope", (P, TABLE, TABLE.to("meta"), GAIN, 2, 8), ValueError, "sin: on meta"),
        ("xsa_gate", (Q, Q[:, :3]), ValueError, "with kv_heads a divisor of 4"),
        ("xsa_gate", (Q, K[:2]), ValueError, r"v: shape \(2, 2, 8\), expected \(6, 2, 8\)"),
        ("xsa_gate", (Q, K, GAIN), ValueError, r"logits: shape \(4,\), expected \(6, 4\)"),
        ("xsa_gate", (Q, K, Q[..., 0].bfloat16()), TypeError, "logits: dtype torch.bfloat16"),
        ("xsa_gate", (Q, K, None, float("inf")), ValueError, "gain: inf"),
        ("xsa_gate", (Q.to_sparse(), K), ValueError, "y: layout"),
        ("two_lane_rms_norm", ([], [], W[0, :2], SQUARE, X, W), ValueError, "lanes: 0 are not accepted"),
        ("two_lane_rms_norm", ([X], [X, X, X], W[0, :2], SQUARE, X, W), ValueError, "branches: 3 are not accepted"),
        ("two_lane_rms_norm", ([X, X[:2]], [], W[0, :2], SQUARE, X, W), ValueError, r"lanes\[1\]: shape \(2, 4\)"),
        ("two_lane_rms_norm", ([X], [X.half()], W[0, :2], SQUARE, X, W), TypeError, r"branches\[0\]: dtype"),
        ("two_lane_rms_norm", ([X], [], W[0], SQUARE, X, W), ValueError, r"keep: shape \(4,\), expected \(2,\)"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], W, X, W), ValueError, r"post: shape \(2, 4\), expected \(2, 2\)"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], SQUARE, X, X), ValueError, r"mix: shape \(3, 4\)"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], SQUARE, X, W.double()), TypeError, "mix: dtype torch.float64"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], SQUARE, X, W, X), ValueError, "skip_weights: expected with a skip"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], SQUARE, X, W, X.to("meta"), W), ValueError, "skip: on meta"),
        ("two_lane_rms_norm", ([X], [], W[0, :2], SQUARE, X.int(), W), TypeError, "x0: dtype torch.int32"),
        ("embedding_smear_norm", (X, X, W[:1], ONE, STARTS), TypeError, "tokens: dtype torch.float32"),
        ("embedding_smear_norm", (TOKENS[0], X, W[:1], ONE, STARTS), ValueError, r"tokens: shape \(5,\)"),
        ("embedding_smear_norm", (TOKENS, X[0], W[:1], ONE, STARTS), ValueError, r"table: shape \(4,\)"),
        ("embedding_smear_norm", (TOKENS, X, W, ONE, STARTS), ValueError, r"weight: shape \(2, 4\) .* w <= 4"),
        ("embedding_smear_norm", (TOKENS, X, W[:1].half(), ONE, STARTS), TypeError, "weight: dtype torch.float16"),
        ("embedding_smear_norm", (TOKENS, X, W[:1], W[0], STARTS), ValueError, r"strength: shape \(4,\)"),
        ("embedding_smear_norm", (TOKENS, X, W[:1], ONE, TOKENS), TypeError, "starts: dtype torch.int64"),
        ("embedding_smear_norm", (TOKENS, X, W[:1], ONE, STARTS[:, :4]), ValueError, r"starts: shape \(1, 4\)"),
        ("embedding_smear_norm", (TOKENS.to("meta"), X, W[:1], ONE, STARTS), ValueError, "tokens: on meta"),
        ("embedding_smear_norm", (TOKENS + 3, X, W[:1], ONE, STARTS), ValueError, r"tokens: value 3 .* 0\.\.2"),
        ("embedding_smear_norm", (TOKENS - 1, X, W[:1], ONE, STARTS), ValueError, r"tokens: value -1 .* 0\.\.2"),
    ],
)
def test_wrong_arguments_are_named(operation, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, operation)(*arguments)
