"""Packed weights to a matrix to compute with, beside its definition."""

import math

import pytest
import torch

from bench.harness.measure import Work
from bench.harness.shapes import SHAPES, name, text
from pgolf import ops

SHAPE = SHAPES.dequantize
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_unpack_dequantize(measure, bits):
    count, rows, dtype = math.prod(SHAPE), math.prod(SHAPE[:-1]), torch.bfloat16

    def make():
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        values = torch.randint(low, high, SHAPE, dtype=torch.int8, device=DEVICE)
        return ops.pack_bits(values, bits), torch.rand(SHAPE[:-1], device=DEVICE).half()

    def call(packed, scale):
        return ops.unpack_dequantize(packed, scale, bits, SHAPE, dtype)

    def reference(packed, scale):
        with ops.backend("reference"):
            return call(packed, scale)

    call(*make())
    measure(
        "unpack_dequantize",
        f"{bits} bits",
        shape=text(SHAPE),
        dtype=name(dtype),
        backend=ops.used()["unpack_dequantize"],
        make=make,
        call=call,
        others={"reference": reference},
        work=Work(bytes=count * bits // 8 + 2 * rows + 2 * count),
    )
