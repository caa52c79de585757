"""Attention: all backends compute the same, documents stay apart, and the choice is explained."""

import itertools
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import pgolf.model.attention
from pgolf.errors import UserError
from pgolf.model.attention import attention, choose_attention, flash

CPU = torch.device("cpu")
BORDERS = [0, 4, 5, 12]


def made_up(rows=1, length=12, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    q, k, v = (torch.randn(rows, length, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return [x.requires_grad_() for x in (q, k, v)]


def definition(q, k, v):
    """One document (length, heads, head_dim), a head and a token at a time."""
    group = q.size(1) // k.size(1)
    rows = []
    for t in range(len(q)):
        heads = [
            ((k[: t + 1, h // group] @ q[t, h]) / q.size(-1) ** 0.5).softmax(0) @ v[: t + 1, h // group]
            for h in range(q.size(1))
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def packed_definition(q, k, v):
    spans = [slice(start, end) for start, end in itertools.pairwise(BORDERS)]
    return torch.cat([definition(q[span], k[span], v[span]) for span in spans])


def packed_gradients(gradient, q, k, v):
    """Of (q, k, v), by formula: inside an operation autograd records nothing."""
    group, scale, result = q.size(1) // k.size(1), q.size(-1) ** -0.5, [torch.zeros_like(x) for x in (q, k, v)]
    for span in (slice(start, end) for start, end in itertools.pairwise(BORDERS)):
        for h in range(q.size(1)):
            a, b, c, g = q[span, h], k[span, h // group], v[span, h // group], gradient[span, h]
            p = (scale * a @ b.T).masked_fill(torch.ones(len(a), len(a)).triu(1).bool(), -torch.inf).softmax(-1)
            dp = g @ c.T
            ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
            result[0][span, h] = ds @ b
            result[1][span, h // group] += ds.T @ a
            result[2][span, h // group] += p.T @ g
    return result


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("backend", ["plain", "sdpa", "auto"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_and_documents_are_the_definition(backend, kv_heads):
    inputs = made_up(rows=2, kv_heads=kv_heads)
    expected = torch.stack([definition(*(x[row] for x in inputs)) for row in range(2)])
    y = attention(*inputs, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)

    inputs = made_up(kv_heads=kv_heads)
    cu_seqlens = torch.tensor([*BORDERS, 12, 12], dtype=torch.int32)
    y = attention(*inputs, cu_seqlens, 7, backend)
    expected = packed_definition(*(x[0] for x in inputs)).unsqueeze(0)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)


# -- FlashAttention and varlen, which need CUDA: their interfaces, filled by the definition ----------------------------


def stand_in_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    assert cu_seqlens.tolist() == BORDERS
    assert longest == 7
    assert q.ndim == k.ndim == 3
    return packed_definition(q, k, v)


def flash3_module():
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        return stand_in_varlen(q, k, v, cu_seqlens_q, max_seqlen_q)

    return {"flash_attn_interface": SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)}


def flash4_modules():
    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, return_lse):
        assert causal
        assert return_lse
        y = stand_in_varlen(q, k, v, cu_seqlens_q, max_seqlen_q)
        return y, torch.zeros(q.size(1), q.size(0)), None, None, None

    def backward(q, k, v, y, gradient, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert lse.shape == (q.size(1), q.size(0))
        return packed_gradients(gradient, q, k, v)

    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    packages = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    return {**packages, "flash_attn.cute.interface": interface}


def varlen_module(version):
    def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
        assert is_causal
        assert q.size(1) == 2 * k.size(1)
        return stand_in_varlen(q, k, v, cu_seq_q, max_q)

    def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0)
        assert enable_gqa == (q.size(1) != k.size(1))
        return stand_in_varlen(q, k, v, cu_seq_q, max_q)

    return {"torch.nn.attention.varlen": SimpleNamespace(varlen_attn={"2.10": old, "2.13": new}[version])}


@pytest.mark.parametrize(
    ("load", "modules"),
    [
        (flash.load_flash3, flash3_module()),
        (flash.load_flash4, flash4_modules()),
        (flash.load_varlen, varlen_module("2.10")),
        (flash.load_varlen, varlen_module("2.13")),
    ],
    ids=["flash3", "flash4", "varlen-2.10", "varlen-2.13"],
)
def test_flash_kernels_are_called_as_they_ask(load, modules, monkeypatch):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(pgolf.model.attention.LOADED, "flash3", load())
    inputs = made_up()
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32)
    expected = attention(*inputs, cu_seqlens, 7, "plain")
    y = attention(*inputs, cu_seqlens, 7, "flash3")
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)
    if load is flash.load_flash4:
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, cu_seqlens, 7, "flash3"), expected)


def test_varlen_takes_fewer_heads_of_k_and_v_as_they_are():
    """torch's own, traced in one graph without data: it is called with them, and nothing is expanded around it."""
    pytest.importorskip("torch.nn.attention.varlen", reason="torch has it since 2.10")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    with FakeTensorMode():
        q, k = (torch.empty(64, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2))
        v, borders = torch.empty_like(k, requires_grad=True), torch.empty(5, dtype=torch.int32)
        compiled = torch.compile(
            flash.load_varlen(), fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
        )
        y = compiled(q, k, v, borders, 32)
        found = torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    assert [tuple(x.shape) for x in (y, *found)] == [(64, 8, 16), (64, 8, 16), (64, 2, 16), (64, 2, 16)]
    assert len(graphs) == 2
    for graph, called, place in zip(graphs, ("_varlen_attn.", "_varlen_attn_backward."), (1, 2), strict=True):
        made = [node for node in graph.graph.nodes if node.op == "call_function"]
        calls = [node for node in made if not node.name.startswith(("getitem", "detach"))]  # these make nothing
        assert [called in str(node.target) for node in calls] == [True], calls
        assert {tuple(node.meta["val"].shape) for node in calls[0].args[place : place + 2]} == {(64, 2, 16)}


def test_padding_is_told_where_documents_become_rows():
    """On a GPU, and compiled, where the lengths are not looked at; here on tensors without data."""
    said = pgolf.model.attention.padding(447, 2048, 98_304)
    assert "sdpa pads packed documents to rows of 2048 tokens: 915,456 tokens for 98,304 (9.3 times)" in said
    assert "ATTENTION=varlen" in said
    assert not pgolf.model.attention.padding(48, 2048, 98_304)
    inputs = [x.detach().to("meta") for x in made_up(length=12)]
    borders = torch.empty(9, dtype=torch.int32, device="meta")
    with pytest.warns(UserWarning, match=r"rows of 7 tokens: 56 tokens for 12 \(4\.7 times\)"):
        attention(*inputs, borders, 7, "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*inputs, borders[:2], 12, "sdpa")
        attention(*made_up(), torch.tensor([0, 1, 2, 3, 12]), 9, "sdpa")  # on a CPU, where nothing is padded


def test_rows_are_documents_of_one_length_to_flash_kernels(monkeypatch):
    seen = []

    def attend(q, k, v, cu_seqlens, max_seqlen):
        seen.append((cu_seqlens.tolist(), max_seqlen))
        return q

    monkeypatch.setitem(pgolf.model.attention.LOADED, "varlen", attend)
    q, k, v = made_up(rows=3, length=5)
    assert torch.equal(attention(q, k, v, backend="varlen"), q)
    assert seen == [([0, 5, 10, 15], 5)]


def test_the_first_that_is_there_is_chosen(monkeypatch):
    there: set[str] = set()

    def loader(name):
        def load():
            if name not in there:
                raise ImportError(f"No module named {name}")
            return lambda *_: None

        return load

    for name in list(pgolf.model.attention.FLASH):
        monkeypatch.setitem(pgolf.model.attention.FLASH, name, loader(name))
    monkeypatch.setattr(pgolf.model.attention, "LOADED", {})
    monkeypatch.setattr(pgolf.model.attention.trial, "failure", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert choose_attention("auto", cuda, bf16, 1024) == "sdpa"
    there.add("varlen")
    assert choose_attention("auto", cuda, bf16, 1024) == "varlen"
    assert choose_attention("auto", cuda, torch.float32, 1024) == "sdpa"
    there |= {"flash3", "flash4"}
    assert choose_attention("auto", cuda, bf16, 1024) == "flash3"
    assert choose_attention("flash4", cuda, bf16, 1024) == "flash4"
    assert choose_attention("plain", cuda, bf16, 1024) == "plain"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert choose_attention("auto", cuda, bf16, 1024) == "flash4"
    there.clear()
    pgolf.model.attention.LOADED.clear()
    with pytest.raises(UserError, match=r"ATTENTION=flash4: cannot be loaded \(ImportError: No module named flash4\)"):
        choose_attention("flash4", cuda, bf16, 1024)


def test_the_choice_on_a_cpu():
    assert choose_attention("auto", CPU, torch.bfloat16, 256) == "plain"
    assert choose_attention("auto", CPU, torch.bfloat16, 2048) == "sdpa"
    assert choose_attention("sdpa", CPU, torch.float32, 256) == "sdpa"
    with pytest.raises(UserError, match="ATTENTION=varlen: needs a CUDA device, this is cpu"):
        choose_attention("varlen", CPU, torch.bfloat16, 256)
