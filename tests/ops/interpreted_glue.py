"""The Triton kernels between the matrix products under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import pytest
import torch
from glue_cases import CASES, exactly, leaves_of, run, upstream_of
from numerics import assert_no_worse

from pgolf import ops

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_against_float64(case, dtype):
    inputs = case.make(dtype, "cpu", 37 if case.operation != "qk_norm_rope" else 19)
    upstream = upstream_of(case, inputs)
    with ops.backend("triton"):
        mine = run(case.ours, inputs, upstream)
    plain, truth = run(case.formula, inputs, upstream), run(case.formula, exactly(inputs), upstream)
    for found, plainly, true in zip(mine, plain, truth, strict=True):
        assert_no_worse(found, plainly, true)
    assert ops.used()[case.operation] == "triton"


@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("add + mix", "part of a head", "xsa + gate", "two lanes + skip", "embedding")]
)
def test_one_token_none_and_the_same_bits_twice(case):
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


def test_a_value_of_zero_has_no_direction():
    y, v = torch.randn(3, 2, 8, requires_grad=True), torch.zeros(3, 1, 8, requires_grad=True)
    with ops.backend("triton"):
        out = ops.xsa_gate(y, v)
        out.sum().backward()
    assert torch.equal(out, y)
    assert not v.grad.any()
