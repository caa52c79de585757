"""Unpacking with scales: against float64, gradients of the scale, registration, hostile input."""

import pytest
import torch
from numerics import DTYPES, TOLERANCE, need, relative_error

from pgolf import ops
from pgolf.ops.unpack_dequantize import unpack_dequantize_reference

BACKENDS = ("reference", "native")
SHAPES = [(3, 7), (2, 5, 16), (1, 2049), (64, 40)]


def random_weights(shape, bits: int, scale_dtype=torch.float16):
    """values int8 of shape, packed, scale shape[:-1]."""
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    return values, ops.pack_bits(values, bits), torch.rand(shape[:-1]).add(0.1).to(scale_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 4, 5, 6, 7, 8])
@pytest.mark.usefixtures("poisoned")
def test_against_float64(backend, bits):
    need("unpack_dequantize", backend)
    for shape in SHAPES:
        values, packed, scale = random_weights(shape, bits)
        truth = values.double() * scale.double().unsqueeze(-1)
        for dtype in (*DTYPES, torch.float64):
            with ops.backend(backend):
                out = ops.unpack_dequantize(packed, scale, bits, shape, dtype)
            assert out.dtype == dtype
            assert relative_error(out, truth) < TOLERANCE[dtype]
            assert torch.equal(out, truth.to(dtype)), "one rounding, so equal to the rounded truth"


@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bits_are_plain_bytes_and_empty_input_is_fine(backend):
    need("unpack_dequantize", backend)
    values = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    octets = values.view(torch.uint8).reshape(-1)
    with ops.backend(backend):
        assert torch.equal(ops.unpack_dequantize(octets, torch.ones(4), 8, (4, 6), torch.float32), values.float())
        for shape in ((0, 5), (3, 0), (2, 0, 4)):
            empty = torch.empty(0, dtype=torch.uint8)
            assert ops.unpack_dequantize(empty, torch.ones(shape[:-1]), 6, shape, torch.bfloat16).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_scale(backend):
    need("unpack_dequantize", backend)
    shape = (2, 3, 5)
    _, packed, scale = random_weights(shape, 5, torch.float64)
    scale.requires_grad_()

    def registered(scale):
        return ops.unpack_dequantize(packed, scale, 5, shape, torch.float64)

    def definition(scale):
        return unpack_dequantize_reference(packed, scale, 5, shape, torch.float64)

    with ops.backend(backend):
        torch.autograd.gradcheck(registered, (scale,))
        torch.autograd.gradcheck(definition, (scale,))
        registered(scale).sum().backward()  # a gradient with zero strides
    (expected,) = torch.autograd.grad(definition(scale).sum(), scale)
    assert torch.equal(scale.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_low_precision(dtype):
    shape = (33, 257)
    values, packed, scale = random_weights(shape, 6, torch.float32)
    scale.requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    ops.unpack_dequantize(packed, scale, 6, shape, dtype).backward(upstream)
    truth = (upstream.double() * values.double()).sum(-1)
    assert relative_error(scale.grad, truth) < 1e-5, "summed in float32 whatever the dtype of the weights"


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_one_graph(backend):
    need("unpack_dequantize", backend)
    shape = (4, 9)
    _, packed, scale = random_weights(shape, 6, torch.float32)
    scale.requires_grad_()
    with ops.backend(backend):
        arguments = (packed, scale, 6, list(shape), torch.float32)
        torch.library.opcheck(torch.ops.pgolf.unpack_dequantize.default, arguments)

        def loss(scale):
            return ops.unpack_dequantize(packed, scale, 6, shape, torch.float32).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        compiled(scale).backward()
        (expected,) = torch.autograd.grad(loss(scale), scale)
    torch.testing.assert_close(scale.grad, expected)


U8 = torch.zeros(6, dtype=torch.uint8)  # 8 values of 6 bits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((U8, torch.ones(3), 6, (2, 4), torch.float32), ValueError, r"scale: shape \(3,\), expected \(2,\)"),
        ((U8, torch.ones(2).int(), 6, (2, 4), torch.float32), TypeError, "scale: dtype torch.int32"),
        ((U8, torch.ones(2), 6, (2, 5), torch.float32), ValueError, "packed: 6 bytes, expected 8"),
        ((U8, torch.ones(()), 6, (8,), torch.float32), ValueError, "shape: .*rows, cols"),
        ((U8, torch.ones(2), 6, (2, 4), torch.int8), TypeError, "dtype: torch.int8"),
        ((U8, torch.ones(2), 0, (2, 4), torch.float32), ValueError, "bits: 0"),
        ((U8.float(), torch.ones(2), 6, (2, 4), torch.float32), TypeError, "packed: dtype"),
        ((U8, torch.ones(2, device="meta"), 6, (2, 4), torch.float32), ValueError, "scale: on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.unpack_dequantize(*arguments)


def test_the_registered_operation_checks_for_itself():
    with pytest.raises(ValueError, match="packed: 6 bytes, expected 8"):
        torch.ops.pgolf.unpack_dequantize(U8, torch.ones(2), 6, (2, 5), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.usefixtures("poisoned")
def test_on_the_gpu(backend):
    need("unpack_dequantize", backend, "cuda")
    for bits in range(1, 9):
        for shape in [*SHAPES, (22, 512, 512)]:
            values, packed, scale = random_weights(shape, bits)
            truth = values.double() * scale.double().unsqueeze(-1)
            for dtype in (*DTYPES, torch.float64):
                with ops.backend(backend):
                    out = ops.unpack_dequantize(packed.cuda(), scale.cuda(), bits, shape, dtype)
                assert torch.equal(out.cpu(), truth.to(dtype))
