"""The training operations on a GPU: exact, the same twice, compiled, captured; and the equal bits of stored weights."""

import subprocess
import sys

import pytest
import torch
from between_products import RECORD as BETWEEN_PRODUCTS
from numerics import DTYPES, NO_WORSE, TOLERANCE, relative_error
from torch import Tensor

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.model.execution import FUSABLE, Execution
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp_reference
from pgolf.ops.softcapped_cross_entropy import softcapped_cross_entropy_reference
from pgolf.settings import load_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
KERNEL = "triton"
MLP_SHAPES = [(63, 24, 40), (1000, 64, 128), (4096, 512, 2048)]  # tokens, D, H
HEAD_SHAPES = [(63, 24, 1000), (1000, 64, 1024), (2048, 512, 8192)]  # tokens, D, V
SOFTCAP = 30.0
ROUNDED_TWICE = 2.0  # for NO_WORSE, where a gradient that was made for 1 is multiplied by another factor


@pytest.fixture(autouse=True)
def _products_in_full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def mlp_inputs(tokens: int, d: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    inputs = normal(tokens, d), normal(h, d) / d**0.5, normal(d, h) / h**0.5
    return tuple(t.to(dtype).requires_grad_() for t in inputs)


def loss_inputs(tokens: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which some are ignored."""
    targets = torch.randint(classes, (tokens,), device=DEVICE)
    targets[::7] = -100
    return (10 * normal(tokens, classes)).to(dtype).requires_grad_(), targets


def head_inputs(tokens: int, d: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    _, targets = loss_inputs(tokens, classes, dtype)
    weight = (5 * normal(classes, d) / d**0.5).to(dtype)
    return normal(tokens, d, dtype=dtype).requires_grad_(), weight.requires_grad_(), targets


def exactly(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same numbers in float64."""
    return tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)


def mlp_formula(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
    z = x @ w_up.mT
    a = torch.where(z > 0, z, slope * z)
    return (a * a) @ w_down.mT


def loss_formula(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    capped = SOFTCAP * torch.tanh(logits / SOFTCAP)
    kept = targets != -100
    losses = torch.logsumexp(capped, -1) - capped.gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    losses = losses.where(kept, 0)
    return losses if reduction == "none" else losses.sum() / (kept.sum() if reduction == "mean" else 1)


def gradients(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor, **options) -> tuple[Tensor, ...]:
    """Of all inputs that ask for one."""
    leaves = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype), **options)


def check(found, plain, truth, no_worse: float = NO_WORSE) -> None:
    """Below the tolerance of its dtype, and not worse than plain PyTorch in the same dtype."""
    for mine, plainly, true in zip(found, plain, truth, strict=True):
        tolerance = TOLERANCE[mine.dtype]
        error, limit = relative_error(mine.detach(), true.detach()), relative_error(plainly.detach(), true.detach())
        assert error < tolerance
        by_chance = 2 / mine.numel() ** 0.5  # two errors of one size, both samples
        order_of_summation = tolerance / 10 if mine.dtype == torch.float32 else tolerance / 1000
        assert error <= (no_worse + by_chance) * limit + order_of_summation


def check_backend(operation: str) -> None:
    assert ops.used()[operation] == KERNEL
    assert operation not in ops.fallbacks()


# Against float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.5, 0.0])
@pytest.mark.usefixtures("poisoned")
def test_mlp_against_float64(dtype, slope):
    for shape in MLP_SHAPES:
        inputs = mlp_inputs(*shape, dtype)
        exact, upstream = exactly(inputs), normal(shape[0], shape[1])
        out, plain, truth = (
            ops.leaky_relu2_mlp(*inputs, slope),
            leaky_relu2_mlp_reference(*inputs, slope),
            mlp_formula(*exact, slope),
        )
        upstream = upstream.to(dtype)
        assert out.dtype == dtype
        check(
            (out, *gradients(out, inputs, upstream)),
            (plain, *gradients(plain, inputs, upstream)),
            (truth, *gradients(truth, exact, upstream)),
        )
    check_backend("leaky_relu2_mlp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1000, 1024, 8192, 20_000])
@pytest.mark.usefixtures("poisoned")
def test_cross_entropy_against_float64(dtype, classes):
    inputs = loss_inputs(97, classes, dtype)
    exact = exactly(inputs)
    for reduction in ("mean", "sum", "none"):
        truth = loss_formula(*exact, reduction)
        plain = softcapped_cross_entropy_reference(*inputs, SOFTCAP, reduction)
        with torch.no_grad():
            assert relative_error(ops.softcapped_cross_entropy(*inputs, SOFTCAP, reduction), truth.detach()) < 1e-5
        scalar = reduction != "none"
        for factor in (1.0, -2.5):
            out = ops.softcapped_cross_entropy(*inputs, SOFTCAP, reduction)
            assert out.dtype == torch.float32
            assert relative_error(out.detach(), truth.detach()) < 1e-5, "float32 whatever the dtype of the logits"
            upstream = torch.full((), factor, device=DEVICE) if scalar else factor * normal(97)
            twice = scalar and factor != 1 and dtype == torch.bfloat16
            check(
                gradients(out, inputs, upstream),
                gradients(plain, inputs, upstream, retain_graph=True),
                gradients(truth, exact, upstream, retain_graph=True),
                no_worse=ROUNDED_TWICE if twice else NO_WORSE,
            )
    check_backend("softcapped_cross_entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_linear_cross_entropy_against_float64(dtype):
    for shape in HEAD_SHAPES:
        hidden, weight, targets = inputs = head_inputs(*shape, dtype)
        exact = exactly(inputs)
        for reduction in ("mean", "sum"):
            truth = loss_formula(exact[0] @ exact[1].mT, targets, reduction)
            logits = torch.nn.functional.linear(hidden, weight)
            plain = softcapped_cross_entropy_reference(logits, targets, SOFTCAP, reduction)
            for factor in (1.0, -2.5):
                out = ops.linear_softcapped_cross_entropy(*inputs, SOFTCAP, reduction)
                assert out.dtype == torch.float32
                assert relative_error(out.detach(), truth.detach()) < TOLERANCE[dtype]
                upstream = torch.full((), factor, device=DEVICE)
                check(
                    gradients(out, inputs, upstream),
                    gradients(plain, inputs, upstream, retain_graph=True),
                    gradients(truth, exact, upstream, retain_graph=True),
                    no_worse=NO_WORSE if factor == 1 else ROUNDED_TWICE,
                )
    check_backend("linear_softcapped_cross_entropy")


def glue_maker(case, dtype: torch.dtype = torch.bfloat16, tokens: int = 4096):
    return lambda: case.make(dtype, DEVICE, tokens)


def joined(operation):
    """All results as one tensor."""
    return lambda *inputs: torch.cat([out.flatten() for out in operation(*inputs)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BETWEEN_PRODUCTS.values(), ids=BETWEEN_PRODUCTS)
@pytest.mark.usefixtures("poisoned")
def test_glue_against_float64(case, dtype):
    for tokens in (1, 63, 5000):
        inputs = case.make(dtype, DEVICE, tokens)
        exact = exactly(inputs)
        out, plain, truth = joined(case.ours)(*inputs), joined(case.formula)(*inputs), joined(case.formula)(*exact)
        assert out.dtype == dtype
        upstream = normal(*out.shape, dtype=dtype)
        check(
            (out, *gradients(out, inputs, upstream)),
            (plain, *gradients(plain, inputs, upstream)),
            (truth, *gradients(truth, exact, upstream)),
        )
    check_backend(case.operation)


def test_the_model_with_fused_glue():
    """A small record, compiled as one graph, in float32: the loss and every gradient as with the plain functions."""
    settings = {"PRESET": "record", "NUM_LAYERS": "10", "MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1"}
    model = Model(ModelConfig.of(load_settings(settings))).initialise(torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens, targets = torch.randint(model.config.vocab_size, (2, 2, 256), device=DEVICE)
    found = []
    for fused in (frozenset(), FUSABLE, FUSABLE - {"qkv_norm_rope"}):
        model.execute(Execution(attention="plain", fused=fused))
        loss = torch.compile(model.loss, fullgraph=True)(tokens, targets)
        parameters = list(model.parameters())
        found.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))
    for plain, *others in zip(*found, strict=True):
        for fused in others:
            torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)
    for name in FUSABLE:
        check_backend(name)


# The same for all


CASES = {
    "leaky_relu2_mlp": (lambda: mlp_inputs(4096, 512, 2048, torch.bfloat16), ops.leaky_relu2_mlp),
    "softcapped_cross_entropy": (
        lambda: loss_inputs(4096, 8192, torch.bfloat16),
        lambda *inputs: ops.softcapped_cross_entropy(*inputs, SOFTCAP),
    ),
    "linear_softcapped_cross_entropy": (
        lambda: head_inputs(4096, 512, 8192, torch.bfloat16),
        lambda *inputs: ops.linear_softcapped_cross_entropy(*inputs, SOFTCAP),
    ),
    **{name: (glue_maker(case), joined(case.ours)) for name, case in BETWEEN_PRODUCTS.items()},
}


@pytest.fixture(params=CASES)
def case(request):
    """(function that makes inputs, the operation on them)."""
    return CASES[request.param]


def results(operation, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """What comes out, and the gradients."""
    out = operation(*inputs)
    return out.detach(), *gradients(out, inputs, upstream.expand(out.shape))


def test_twice_the_same_bits(case):
    make, operation = case
    inputs, upstream = make(), normal(1).squeeze()
    for first, second in zip(results(operation, inputs, upstream), results(operation, inputs, upstream), strict=True):
        assert torch.equal(first, second)


def test_a_graph_that_is_kept_gives_its_gradients_again(case):
    make, operation = case
    inputs = make()
    out = operation(*inputs)
    one, other = torch.full((), 1.0, device=DEVICE), torch.full((), -2.5, device=DEVICE)
    first = gradients(out, inputs, one.expand(out.shape), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = gradients(out, inputs, other.expand(out.shape), retain_graph=True)
    third = gradients(out, inputs, one.expand(out.shape))
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b), "what was handed out is not written again"
        assert relative_error(c, -2.5 * b.double()) < TOLERANCE[b.dtype]
        assert relative_error(d, b.double()) < TOLERANCE[b.dtype]


def test_compiled_as_one_graph(case):
    make, operation = case
    inputs, upstream = make(), torch.full((), -2.5, device=DEVICE)
    compiled = torch.compile(operation, fullgraph=True)
    eager = results(operation, inputs, upstream)
    for mine, expected in zip(results(compiled, inputs, upstream), eager, strict=True):
        assert mine.dtype == expected.dtype
        assert relative_error(mine, expected.double()) < TOLERANCE[expected.dtype]


def test_captured_and_replayed_with_other_numbers(case):
    make, operation = case
    inputs, upstream = make(), torch.full((), 1.0, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(operation, inputs, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(operation, inputs, upstream)
    with torch.no_grad():
        for old, new in zip((*inputs, upstream), (*make(), torch.full((), -2.5, device=DEVICE)), strict=True):
            old.copy_(new)
    for out in captured:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for mine, expected in zip(captured, results(operation, inputs, upstream), strict=True):
        assert torch.equal(mine, expected)


# Targets out of range: in a process of its own, because the assertion ends the use of the device


BAD_TARGET = """
import torch
from pgolf import ops

targets = torch.tensor([0, 5, {target}, 3], device="cuda")
if {operation!r} == "embedding":
    start = torch.zeros(1, device="cuda")
    loss = ops.embedding_smear_norm(
        targets[None], torch.randn(1000, 16, device="cuda"), start[None], start, targets[None] < 0
    ).sum()
elif {operation!r} == "linear":
    loss = ops.linear_softcapped_cross_entropy(
        torch.randn(4, 16, device="cuda"), torch.randn(1000, 16, device="cuda"), targets
    )
else:
    loss = ops.softcapped_cross_entropy(torch.randn(4, 1000, device="cuda"), targets)
torch.cuda.synchronize()
print("accepted", loss.item())
"""


@pytest.mark.parametrize(
    ("target", "operation"),
    [(1000, "loss"), (2**32 + 1, "loss"), (-1, "linear"), (1000, "embedding"), (-1, "embedding")],
)
def test_a_target_or_token_out_of_range_raises(target, operation):
    done = subprocess.run(
        [sys.executable, "-c", BAD_TARGET.format(target=target, operation=operation)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0, done.stdout
    assert "accepted" not in done.stdout
    assert f"a {'token' if operation == 'embedding' else 'target'} is outside 0..V-1" in done.stderr
    assert "device-side assert" in done.stderr


# Stored weights


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_stored_weights_are_the_same_bits_as_on_the_cpu(bits):
    shape = (22, 512, 512)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    scale = (torch.rand(shape[:-1]) + 0.1).half()
    packed = ops.pack_bits(values, bits)
    on_device = ops.pack_bits(values.to(DEVICE), bits)
    assert torch.equal(on_device.cpu(), packed)
    assert torch.equal(ops.unpack_bits(on_device, bits, shape).cpu(), values)
    for dtype in DTYPES:
        found = ops.unpack_dequantize(on_device, scale.to(DEVICE), bits, shape, dtype)
        assert torch.equal(found.cpu(), ops.unpack_dequantize(packed, scale, bits, shape, dtype))
