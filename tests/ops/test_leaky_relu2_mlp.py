"""The feed-forward block against float64, with gradients, odd shapes and hostile input."""

import pytest
import torch
from numerics import DTYPES, NO_WORSE, TOLERANCE, relative_error

from pgolf import ops
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp_reference

SHAPES = [((63,), 24, 40), ((3, 7), 17, 30), ((1000,), 64, 128)]  # tokens, D, H


def random_inputs(tokens, d, h, dtype, requires_grad=False):
    x, up, down = torch.randn(*tokens, d), torch.randn(h, d) / d**0.5, torch.randn(d, h) / h**0.5
    return tuple(t.to(dtype).requires_grad_(requires_grad) for t in (x, up, down))


def formula(x, w_up, w_down, slope):
    """Written out from the docstring, without torch's activation functions."""
    z = x @ w_up.mT
    a = torch.where(z > 0, z, slope * z)
    return (a * a) @ w_down.mT


@pytest.mark.parametrize("slope", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_forward_and_gradients_against_float64(dtype, slope):
    for tokens, d, h in SHAPES:
        inputs = random_inputs(tokens, d, h, dtype, requires_grad=True)
        upstream = torch.randn(*tokens, d).to(dtype)
        exact = tuple(t.detach().double().requires_grad_() for t in inputs)
        truth = formula(*exact, slope)
        plain = formula(*inputs, slope)
        out = ops.leaky_relu2_mlp(*inputs, slope)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out, inputs, upstream)
        plain_grads = torch.autograd.grad(plain, inputs, upstream)
        true_grads = torch.autograd.grad(truth, exact, upstream.double())
        for mine, plainly, true in zip((out, *grads), (plain, *plain_grads), (truth, *true_grads), strict=True):
            error = relative_error(mine.detach(), true.detach())
            assert error < TOLERANCE[dtype]
            assert error <= NO_WORSE * relative_error(plainly.detach(), true.detach()) + 1e-3 * TOLERANCE[dtype]


@pytest.mark.parametrize("slope", [0.5, 0.0])
def test_gradcheck(slope):
    inputs = random_inputs((2, 3), 4, 5, torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: leaky_relu2_mlp_reference(*t, slope), inputs)
    torch.autograd.gradcheck(lambda *t: ops.leaky_relu2_mlp(*t, slope), inputs)


def test_saves_one_tensor_of_the_hidden_size():
    x, up, down = random_inputs((50,), 16, 32, torch.float32, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ops.leaky_relu2_mlp(x, up, down)
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted([(50, 16), (32, 16), (16, 32), (50, 32)])
    assert any(tensor is x or tensor.data_ptr() == x.data_ptr() for tensor in kept), "x itself, no copy"
    out.sum().backward()

    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        formula(x, up, down, 0.5)
    assert sum(tensor.shape == (50, 32) for tensor in kept) > 1, "the definition keeps more, or this test sees nothing"


@pytest.mark.parametrize("slope", [0.5, 0.0])
def test_registration(slope):
    inputs = random_inputs((6,), 8, 16, torch.float32, requires_grad=True)
    torch.library.opcheck(torch.ops.pgolf.leaky_relu2_mlp.default, (*inputs, slope, "reference"))
    x, _, down = (value.detach() for value in inputs)
    hidden = torch.randn(6, 16)
    torch.library.opcheck(
        torch.ops.pgolf.leaky_relu2_mlp_hidden_gradient.default, (x, down, hidden, slope, "reference")
    )
    torch.library.opcheck(torch.ops.pgolf.weight_gradient.default, (x, hidden))


def test_one_of_the_three_gradients_at_a_time():
    inputs = random_inputs((9,), 4, 6, torch.float64)
    whole = [value.clone().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(ops.leaky_relu2_mlp(*whole).sin().sum(), whole)
    for index in range(3):
        leaves = [value.clone().requires_grad_(i == index) for i, value in enumerate(inputs)]
        (grad,) = torch.autograd.grad(ops.leaky_relu2_mlp(*leaves).sin().sum(), leaves[index])
        assert torch.equal(grad, expected[index])


def test_empty_input_zero_strides_and_frozen_weights():
    x, up, down = random_inputs((0, 3), 4, 5, torch.float32, requires_grad=True)
    out = ops.leaky_relu2_mlp(x, up, down)
    assert out.shape == (0, 3, 4)
    out.sum().backward()
    assert torch.equal(up.grad, torch.zeros_like(up))

    x, up, down = random_inputs((7,), 4, 5, torch.float32, requires_grad=True)
    ops.leaky_relu2_mlp(x, up, down).sum().backward()  # a gradient with zero strides
    (dense,) = torch.autograd.grad(ops.leaky_relu2_mlp(x, up, down), x, torch.ones(7, 4))
    torch.testing.assert_close(x.grad, dense)
    out = ops.leaky_relu2_mlp(x.t().contiguous().t(), up.detach(), down.detach())
    (frozen,) = torch.autograd.grad(out, x, torch.ones(7, 4))
    torch.testing.assert_close(frozen, dense)


def test_relu2_stays_finite_where_the_input_is_not():
    x = torch.tensor([[-torch.inf]])
    assert ops.leaky_relu2_mlp(x, torch.ones(1, 1), torch.ones(1, 1), slope=0.0).item() == 0


def test_one_graph_also_under_autocast():
    inputs = random_inputs((6,), 8, 16, torch.float32)
    compiled = torch.compile(ops.leaky_relu2_mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), ops.leaky_relu2_mlp(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*inputs).dtype == torch.bfloat16
        mixed = ops.leaky_relu2_mlp(inputs[0].bfloat16(), *inputs[1:])
        assert torch.equal(mixed, ops.leaky_relu2_mlp(*inputs))


def test_the_compiler_saves_no_graph_for_book_keeping():
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(ops.leaky_relu2_mlp, fullgraph=True, backend=counting)
    inputs = random_inputs((6,), 8, 16, torch.float32)
    for _ in range(3):
        compiled(*inputs)
        ops.newton_schulz(inputs[1])
    assert len(graphs) == 1
    with ops.backend("reference"):
        compiled(*inputs)
    assert len(graphs) == 2, "forcing a backend is a reason to compile anew"


X, UP, DOWN = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, UP, DOWN.t()), ValueError, r"w_down: shape \(5, 4\), expected \(4, 5\)"),
        ((X, torch.zeros(5, 3), DOWN), ValueError, r"w_up: shape \(5, 3\), expected \(5, 4\)"),
        ((X, torch.zeros(4), DOWN), ValueError, r"w_up: shape \(4,\)"),
        ((torch.tensor(1.0), UP, DOWN), ValueError, "x: a 0-dimensional"),
        ((X.int(), UP, DOWN), TypeError, "x: dtype torch.int32"),
        ((X, UP.half(), DOWN), TypeError, "w_up: dtype torch.float16, but x is torch.float32"),
        ((X, UP.to("meta"), DOWN), ValueError, "w_up: on meta, but x is on cpu"),
        ((X, UP, DOWN, -0.1), ValueError, "slope: -0.1"),
        ((X, UP, DOWN, float("nan")), ValueError, "slope: nan"),
        ((X, UP, DOWN, "0.5"), TypeError, "slope: expected a float, got str"),
        ((X.to_sparse(), UP, DOWN), ValueError, "x: layout"),
        ((X.numpy(), UP, DOWN), TypeError, "x: expected a torch.Tensor, got ndarray"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.leaky_relu2_mlp(*arguments)
