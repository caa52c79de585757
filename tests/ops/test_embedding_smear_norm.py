"""embedding_smear_norm against float64, with gradients, registration and hostile input."""

import pytest
import torch
from numerics import DTYPES
from operation_cases import (
    Case,
    check_against_float64,
    check_one_graph,
    check_zero_strides_and_frozen_inputs,
    kept_for_backward,
    leaf,
    rms,
    scalars,
)

from pgolf import ops
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference


def embedding(vocabulary: int, dim: int, window: int, rows: int = 2) -> Case:
    """The gate's weight and strength are one tensor: the error of one sum says nothing where it is near zero."""

    def make(dtype, device, tokens):
        length = tokens + (tokens > 0)  # the first has none before it, and the second, here, always one
        chosen = torch.randint(vocabulary, (rows, length), device=device)
        starts = torch.rand(rows, length, device=device) < 0.1
        starts[:, 1:2] = False
        table = leaf(vocabulary, dim, dtype=dtype, device=device)
        return table, chosen, scalars(window + 1, dtype, device), starts

    def ours(table, tokens, gate, starts):
        return (ops.embedding_smear_norm(tokens, table, gate[None, :-1], gate[-1:], starts),)

    def formula(table, tokens, gate, starts):
        e = table[tokens]
        before = torch.cat((torch.zeros_like(e[:, :1]), e[:, :-1]), 1) * ~starts.unsqueeze(-1)
        s = e + gate[-1] * torch.sigmoid((e[..., :window] * gate[:-1]).sum(-1, keepdim=True)) * before
        return (s / rms(s),)

    return Case("embedding_smear_norm", make, ours, formula, by_row=True, order=0.25)


CASES = {"embedding": embedding(31, 40, 12)}
RECORD = {"embedding": embedding(8192, 512, 12, rows=1)}
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
    check_one_graph(CASES["embedding"])


@CASE
def test_gradients_of_zero_strides_and_frozen_inputs(case):
    check_zero_strides_and_frozen_inputs(case)


def test_the_definition_is_the_formula():
    table, tokens, gate, starts = inputs = CASES["embedding"].make(torch.float64, "cpu", 5)
    found = embedding_smear_norm_reference(tokens, table, gate[None, :-1], gate[-1:], starts)
    torch.testing.assert_close((found,), CASES["embedding"].formula(*inputs))


def test_opcheck():
    table, tokens, gate, starts = CASES["embedding"].make(torch.float32, "cpu", 6)
    gate = gate.detach()
    tensors = tokens, table, gate[None, :-1].requires_grad_(), gate[-1:].clone().requires_grad_(), starts
    torch.library.opcheck(torch.ops.pgolf.embedding_smear_norm.default, (*tensors, "reference"))
    tensors = [*(t.detach() for t in tensors), torch.randn(*tokens.shape, table.shape[1])]
    torch.library.opcheck(torch.ops.pgolf.embedding_smear_norm_backward.default, (*tensors, "reference"))
    torch.library.opcheck(torch.ops.pgolf.embedding_gradient.default, (tensors[-1], tokens, table.shape[0]))


def test_compiled_the_table_gradient_stays_in_one_order():
    """torch.compile makes additions in any order, atomics on a GPU, of torch's own sum, and none of ours."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    table, tokens, gate, starts = CASES["embedding"].make(torch.float32, "cpu", 6)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    called = []
    for embed in (ops.embedding_smear_norm, embedding_smear_norm_reference):
        torch.compiler.reset()
        compiled = torch.compile(embed, fullgraph=True, backend=backend)
        compiled(tokens, table, gate[None, :-1], gate[-1:], starts).sum().backward()
        called.append({str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"})
    ours, plain = called
    assert "pgolf.embedding_gradient.default" in ours
    assert not any("index_put" in name or "scatter" in name for name in ours)
    assert any("index_put" in name for name in plain)


def test_no_embedding_is_kept():
    inputs, (out,), saved = kept_for_backward(CASES["embedding"], tokens=200)
    assert max(tensor.numel() for tensor in saved) == inputs[0].numel() < out.numel() / 10


X, W, ONE = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(1)
TOKENS, STARTS = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, W[:1], ONE, STARTS), TypeError, "tokens: dtype torch.float32"),
        ((TOKENS[0], X, W[:1], ONE, STARTS), ValueError, r"tokens: shape \(5,\)"),
        ((TOKENS, X[0], W[:1], ONE, STARTS), ValueError, r"table: shape \(4,\)"),
        ((TOKENS, X, W, ONE, STARTS), ValueError, r"weight: shape \(2, 4\) .* w <= 4"),
        ((TOKENS, X, W[:1].half(), ONE, STARTS), TypeError, "weight: dtype torch.float16"),
        ((TOKENS, X, W[:1], W[0], STARTS), ValueError, r"strength: shape \(4,\)"),
        ((TOKENS, X, W[:1], ONE, TOKENS), TypeError, "starts: dtype torch.int64"),
        ((TOKENS, X, W[:1], ONE, STARTS[:, :4]), ValueError, r"starts: shape \(1, 4\)"),
        ((TOKENS.to("meta"), X, W[:1], ONE, STARTS), ValueError, "tokens: on meta"),
        ((TOKENS + 3, X, W[:1], ONE, STARTS), ValueError, r"tokens: value 3 .* 0\.\.2"),
        ((TOKENS - 1, X, W[:1], ONE, STARTS), ValueError, r"tokens: value -1 .* 0\.\.2"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.embedding_smear_norm(*arguments)
