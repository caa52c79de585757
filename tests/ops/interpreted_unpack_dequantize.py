"""The Triton kernel of unpack_dequantize under TRITON_INTERPRET=1; test_interpreter.py runs this file."""

import pytest
import torch
from test_unpack_dequantize import SHAPES, random_weights

from pgolf import ops
from pgolf.triton_kernels.unpack_dequantize import launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.usefixtures("poisoned")
def test_equal_to_the_rounded_truth(dtype, bits):
    for shape in [*SHAPES, (0, 4), (1, 1), (3, 1025)]:
        for scale_dtype in (torch.float16, torch.float32):
            values, packed, scale = random_weights(shape, bits, scale_dtype)
            with ops.backend("triton"):
                out = ops.unpack_dequantize(packed, scale, bits, shape, dtype)
            truth = values.double() * scale.double().unsqueeze(-1)
            assert torch.equal(out, truth.float().to(dtype))


def test_gradient():
    _, packed, scale = random_weights((3, 5), 6, torch.float64)
    with ops.backend("triton"):
        scale.requires_grad_()
        ops.unpack_dequantize(packed, scale, 6, (3, 5), torch.float64).sum().backward()
    expected = ops.unpack_bits(packed, 6, (3, 5)).double().sum(-1)
    assert torch.equal(scale.grad, expected)


def test_nothing_outside_is_touched():
    values, packed, scale = random_weights((5, 11), 3)
    memory = torch.full((7, 11), torch.nan)
    launch(packed, scale, memory[1:6], 3)
    assert torch.equal(memory[1:6], values * scale.float().unsqueeze(-1))
    assert memory[0].isnan().all()
    assert memory[6].isnan().all()
