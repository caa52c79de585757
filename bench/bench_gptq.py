"""GPTQ of a matrix and of a bank; a bank beside a loop over its matrices."""

import math

import pytest
import torch
from harness import Work
from shapes import SHAPES, text

from pgolf import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = 6


@pytest.mark.parametrize("case", SHAPES.gptq)
def test_gptq(measure, case):
    shape = SHAPES.gptq[case]
    count, rows, columns = math.prod(shape[:-2]), *shape[-2:]

    def make():
        inputs = torch.randn(*shape[:-2], 2 * columns, columns, device=DEVICE)
        inputs *= torch.rand(columns, device=DEVICE) + 0.1  # so that the order of columns matters
        return torch.randn(shape, device=DEVICE), inputs.mT @ inputs

    def call(weight, hessian):
        return ops.gptq(weight, hessian, BITS)

    def one_by_one(weight, hessian):
        values, scales = zip(*(call(*pair) for pair in zip(weight, hessian, strict=True)), strict=True)
        return torch.stack(values), torch.stack(scales)

    call(*make())
    measure(
        "gptq",
        case,
        shape=text(shape),
        dtype="float32",
        backend=ops.used()["gptq"],
        make=make,
        call=call,
        others={"one by one": one_by_one} if len(shape) == 3 else {},
        tolerance=1e-2,  # a value that lies between two grid points may go either way
        work=Work(
            bytes=count * (5 * rows * columns + 4 * columns**2),
            flops=count * (2 * columns**3 // 3 + rows * columns**2),
        ),
    )
