"""The Triton kernels between the matrix products under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import pytest
import torch
from between_products import CASES
from numerics import assert_no_worse
from operation_cases import exactly, leaves_of, run, upstream_of

from pgolf import ops

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_against_float64(case, dtype):
    inputs = case.make(dtype, "cpu", 19 if case.by_row else 37)
    upstream = upstream_of(case, inputs)
    with ops.backend("triton"):
        mine = run(case.ours, inputs, upstream)
    plain, truth = run(case.formula, inputs, upstream), run(case.formula, exactly(inputs), upstream)
    for found, plainly, true in zip(mine, plain, truth, strict=True):
        assert_no_worse(found, plainly, true, case.order)
    assert ops.used()[case.operation] == "triton"


@pytest.mark.parametrize(
    "name",
    ["add + mix", "part of a head", "of one product, with gate", "xsa + gate", "two lanes + skip", "embedding"],
)
def test_one_token_none_and_the_same_bits_twice(name):
    case = CASES[name]
    with ops.backend("triton"):
        for tokens in (0, 1):
            inputs = case.make(torch.float32, "cpu", tokens)
            upstream = upstream_of(case, inputs)
            first, second = run(case.ours, inputs, upstream), run(case.ours, inputs, upstream)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert [g.shape for g in first[-len(leaves_of(inputs)) :]] == [leaf.shape for leaf in leaves_of(inputs)]


@pytest.mark.usefixtures("poisoned")
def test_weights_in_float32_and_strides():
    x, branch, stream, weights = CASES["add + mix"].make(torch.float16, "cpu", 20)
    wide = weights.detach().float().requires_grad_()
    turned = x.detach().t().contiguous().t().requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float16).expand(20, 48)  # a gradient with zero strides
    results = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            out = ops.residual_rms_norm(turned, branch, [stream], wide)
            results.append([*out, *torch.autograd.grad(out, (turned, wide), (one, one))])
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-2)


@pytest.mark.usefixtures("poisoned")
def test_columns_of_a_wider_tensor_are_read_where_they_lie():
    wide, y = torch.randn(2, 9, 60), torch.randn(2, 9, 3, 8)
    q, k, v, logits = (
        wide[..., 1 + i : 1 + i + n].unflatten(-1, shape)
        for i, n, shape in ((0, 24, (3, 8)), (24, 8, (1, 8)), (32, 8, (1, 8)), (40, 3, (3,)))
    )
    tables = torch.randn(2, 9, 4).unbind(0)
    inputs = (y, q, k, v, logits, *tables, torch.randn(3))

    def everything(y, q, k, v, logits, cos, sin, gain):
        return *ops.qk_norm_rope(q, k, cos, sin, gain), ops.xsa_gate(y, v, logits)

    found = []
    for form in (lambda t: t, torch.Tensor.contiguous):
        leaves = [form(t).detach().requires_grad_() for t in inputs]
        with ops.backend("triton"):
            outs = everything(*leaves)
            grads = torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves, allow_unused=True)
        found.append([*outs, *(grad for grad in grads if grad is not None)])
    assert len(found[0]) == 3 + 6
    for strided, contiguous in zip(*found, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.usefixtures("poisoned")
def test_one_product_whose_rows_lie_apart():
    case = CASES["of one product, with gate"]
    projected, *others = case.make(torch.float32, "cpu", 8)
    upstream = upstream_of(case, (projected, *others))
    apart = torch.randn(2, 8, projected.shape[-1] + 5)[..., 2:-3].copy_(projected.detach())
    turned = projected.detach().transpose(0, 2).contiguous().transpose(0, 2)
    with ops.backend("triton"):
        expected = run(case.ours, (projected, *others), upstream)
        for other in (apart, turned):
            assert not other.is_contiguous()
            found = run(case.ours, (other.requires_grad_(), *others), upstream)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_value_of_zero_has_no_direction():
    y, v = torch.randn(3, 2, 8, requires_grad=True), torch.zeros(3, 1, 8, requires_grad=True)
    with ops.backend("triton"):
        out = ops.xsa_gate(y, v)
        out.sum().backward()
    assert torch.equal(out, y)
    assert not v.grad.any()
