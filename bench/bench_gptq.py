"""GPTQ of a matrix, of a bank, and of all matrices of a record beside its own function; coordinate descent after it."""

import math

import pytest
import torch

from bench.harness.measure import Work
from bench.harness.shapes import RECORD_GPTQ, SHAPES, text
from bench.peers import contenders
from pgolf import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = 6


def inputs(shape):
    """(weight, hessian) of a matrix or a bank."""
    x = torch.randn(*shape[:-2], 2 * shape[-1], shape[-1], device=DEVICE)
    x *= torch.rand(shape[-1], device=DEVICE) + 0.1  # so that the order of columns matters
    return torch.randn(shape, device=DEVICE), x.mT @ x


def call(weight, hessian):
    return ops.gptq(weight, hessian, BITS)


def one_by_one(weight, hessian):
    values, scales = zip(*(call(*pair) for pair in zip(weight, hessian, strict=True)), strict=True)
    return torch.stack(values), torch.stack(scales)


def work(shape) -> Work:
    """Of the factorisation and the sums."""
    count, rows, columns = math.prod(shape[:-2]), *shape[-2:]
    return Work(
        bytes=count * (5 * rows * columns + 4 * columns**2),
        flops=count * (columns**3 // 3 + rows * columns**2),
    )


@pytest.mark.parametrize("case", SHAPES.gptq)
def test_gptq(measure, case):
    shape = SHAPES.gptq[case]
    call(*inputs(shape))
    measure(
        "gptq",
        case,
        shape=text(shape),
        dtype="float32",
        backend=ops.used()["gptq"],
        make=lambda: inputs(shape),
        call=call,
        others={"one by one": one_by_one} if len(shape) == 3 else {},
        tolerance=1e-2,  # a value that lies between two grid points may go either way
        work=work(shape),
    )


@pytest.mark.parametrize("case", RECORD_GPTQ)
def test_gptq_of_the_record(measure, case):
    shape = RECORD_GPTQ[case]
    call(*inputs((1, 1)))
    measure(
        "gptq",
        case,
        shape=text(shape),
        dtype="float32",
        backend=ops.used()["gptq"],
        make=lambda: inputs(shape),
        call=call,
        peers=contenders("gptq", "parameter_golf"),
        tolerance=1e-2,
        work=work(shape),
    )


@pytest.mark.parametrize("case", SHAPES.gptq)
def test_gptq_refine(measure, case):
    shape = SHAPES.gptq[case]
    count, rows, columns = math.prod(shape[:-2]), *shape[-2:]

    def make():
        weight, hessian = inputs(shape)
        return weight, hessian, *call(weight, hessian)

    ops.gptq_refine(*make(), BITS)
    measure(
        "gptq_refine",
        case,
        shape=text(shape),
        dtype="float32",
        backend=ops.used()["gptq_refine"],
        make=make,
        call=lambda *arguments: ops.gptq_refine(*arguments, BITS),
        others={"gptq itself": lambda weight, hessian, values, scale: call(weight, hessian)},
        tolerance=None,  # it is what the time is to be compared with
        work=Work(
            bytes=count * (6 * rows * columns + 4 * columns**2),
            flops=count * 4 * rows * columns**2,
        ),
    )
