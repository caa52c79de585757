"""The Triton kernels of leaky_relu2_mlp under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import pytest
import torch
import triton
import triton.language as tl
from numerics import NO_WORSE, TOLERANCE, relative_error
from test_leaky_relu2_mlp import formula, random_inputs

from pgolf import ops
from pgolf.triton_kernels.leaky_relu2_mlp import activation, derivative, launch_gradient, launch_up

SINGLE = ((1,), 1, 1)  # tokens, D, H
SHAPES = [((63,), 24, 40), ((3, 7), 17, 30), ((100,), 33, 65), SINGLE, ((256,), 64, 128)]
TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@pytest.mark.parametrize("slope", [0.5, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_against_float64(dtype, slope):
    for shape in SHAPES:
        inputs = random_inputs(*shape, dtype, requires_grad=True)
        upstream = torch.randn_like(inputs[0])
        if shape == SINGLE:  # the products of small values are subnormal in float16, and have few digits
            for tensor in (*inputs, upstream):
                tensor.data = torch.where(tensor < 0, -1, 1) * tensor.data.abs().clamp_min(0.25)
        exact = tuple(t.detach().double().requires_grad_() for t in inputs)
        results = []
        with ops.backend("triton"):
            outs = ops.leaky_relu2_mlp(*inputs, slope), formula(*inputs, slope), formula(*exact, slope)
            for out, leaves in zip(outs, (inputs, inputs, exact), strict=True):
                grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
                results.append([out.detach(), *grads])
        for mine, plainly, true in zip(*results, strict=True):
            if true.norm() < max(1e-6, torch.finfo(dtype).tiny):  # a single z that relu² takes away
                continue
            error = relative_error(mine, true)
            assert error < TOLERANCE[dtype]
            if mine.numel() >= 5000:  # below, chance decides
                assert error <= NO_WORSE * relative_error(plainly, true)
    assert ops.used()["leaky_relu2_mlp"] == "triton"


def test_strides_zero_strides_and_unaligned_memory():
    x, up, down = random_inputs((20,), 24, 40, torch.float32)
    expected = ops.leaky_relu2_mlp(x, up, down)
    with ops.backend("triton"):
        shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)  # 4 bytes past a multiple of 16
        turned = x.t().contiguous().t()
        sliced = torch.cat((down, down), dim=1)[:, :40]
        for case in ((shifted, up, down), (turned, up, down), (x, up, sliced)):
            torch.testing.assert_close(ops.leaky_relu2_mlp(*case), expected, rtol=1e-5, atol=1e-5)
        one = x[:1].expand(20, -1).requires_grad_()
        (grad,) = torch.autograd.grad(ops.leaky_relu2_mlp(one, up, down).sum(), one)
    with ops.backend("reference"):
        (truth,) = torch.autograd.grad(ops.leaky_relu2_mlp(one, up, down).sum(), one)
    torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-5)


def test_empty_sizes_go_round_the_kernels():
    for tokens, d, h in (((0,), 4, 5), ((3,), 0, 5), ((3,), 4, 0)):
        inputs = (
            random_inputs(tokens, 1, 1, torch.float32)[0].new_zeros(*tokens, d),
            torch.zeros(h, d),
            torch.zeros(d, h),
        )
        leaves = [value.requires_grad_() for value in inputs]
        with ops.backend("triton"):
            out = ops.leaky_relu2_mlp(*leaves)
            out.sum().backward()
        assert out.shape == (*tokens, d)
        assert all((leaf.grad == 0).all() for leaf in leaves)


def test_one_tensor_of_the_hidden_size_is_kept():
    inputs = random_inputs((50,), 16, 32, torch.float32, requires_grad=True)
    kept = []
    with (
        ops.backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
    ):
        ops.leaky_relu2_mlp(*inputs)
    assert sorted(kept) == sorted([(50, 16), (32, 16), (16, 32), (50, 32)])


def test_launchers_of_float16_and_deterministic_results():
    x, up, down = random_inputs((40,), 16, 24, torch.float16)
    hidden = launch_up(x, up, 0.5)
    assert torch.equal(hidden, launch_up(x, up, 0.5))
    z = x.double() @ up.double().t()
    negative = hidden.view(torch.int16) & 1 == 1
    assert (negative == (z < 0))[z.abs() > 1e-3].all(), "the last bit is the sign"
    dz = launch_gradient(x, down, hidden, 0.5)
    truth = (x.double() @ down.double()) * torch.where(z > 0, 2 * z, 0.5 * z)
    assert relative_error(dz, truth) < 2e-3


@triton.jit
def elementwise_kernel(z_ptr, hidden_ptr, derivative_ptr, count, slope, BLOCK: tl.constexpr, RELU: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < count, other=0.0)
    hidden = activation(z, slope, RELU, hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + at, hidden, mask=at < count)
    tl.store(derivative_ptr + at, derivative(hidden, slope, RELU), mask=at < count)


def elementwise(z, slope, dtype):
    """hidden and d(a²)/dz of float32 z."""
    hidden, slopes = torch.empty_like(z, dtype=dtype), torch.empty_like(z)
    elementwise_kernel[(triton.cdiv(z.numel(), 1024),)](z, hidden, slopes, z.numel(), slope, 1024, slope == 0)
    return hidden, slopes


@pytest.mark.parametrize("slope", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_within_one_unit_and_the_last_bit_is_the_sign(dtype, slope):
    z = torch.cat((torch.randn(4000) * 3, torch.randn(2000) * 0.01, torch.randn(200) * 1e-4))
    hidden, slopes = elementwise(z, slope, dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = hidden.view(integer)
    assert torch.equal(bits & 1 == 1, z < 0)
    a = torch.where(z >= 0, z, slope * z)
    exact = (a * a).double()  # as float32 has it
    ulp, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    unit = ulp * torch.exp2(exact.clamp_min(least).log2().floor())
    assert ((hidden.double() - exact).abs() <= unit).all()
    d = torch.where(z >= 0, 2 * a, 2 * slope * a).double()
    ordinary = exact > 2 * least
    assert ((slopes - d).abs() <= 2 * ulp * d.abs())[ordinary].all(), "the root has half the relative error"
    assert ((slopes - d).abs() <= 4 * least**0.5)[~ordinary].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_special_values(dtype):
    z = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30])
    hidden, slopes = elementwise(z, 0.5, dtype)
    assert (hidden[:2] == 0).all()
    assert slopes[0] == 0
    assert hidden[2] == torch.inf
    assert hidden[3].isnan(), "an infinite square has no bit to spare"
    assert hidden[4].isnan()
    assert slopes[4].isnan()
    assert hidden[5:].float().abs().max() < 1e-4
    hidden, slopes = elementwise(z, 0.0, dtype)
    assert hidden[3] == 0, "relu² forgets minus infinity"
    assert slopes[3] == 0
    assert hidden[4].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_two_roundings(dtype):
    z = torch.randn(100_000)
    a = torch.where(z > 0, z, 0.5 * z)
    hidden, slopes = elementwise(z, 0.5, dtype)
    plain = torch.where(z > 0, z, 0.5 * z).to(dtype)
    truth = a.double().square()
    assert relative_error(hidden, truth) <= relative_error(plain * plain, truth)
    d = torch.where(z > 0, 2 * a, a).double()
    assert relative_error(slopes, d) <= 1.05 * relative_error(torch.where(z > 0, 2 * plain, plain), d)
