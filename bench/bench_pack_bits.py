"""Packing and unpacking integers, every code path of this machine, beside numpy's packbits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.harness.measure import Work
from bench.harness.shapes import SHAPES
from pgolf import ops
from pgolf.ops import backends

COUNT = SHAPES.values
CUDA = torch.cuda.is_available()


def paths() -> list[str]:
    """ "reference", and "native" or, on the CPU, its levels as "native avx512vbmi"."""
    if not ops.available()["pack_bits"]["native"].ok:
        return ["reference"]
    return ["reference", *(["native"] if CUDA else [f"native {level}" for level in backends.native().levels()])]


@pytest.fixture(params=paths())
def path(request: pytest.FixtureRequest):
    """Yields the name of a code path while it is the one in use."""
    backend, _, level = request.param.partition(" ")
    before = backends.native().level() if level else ""
    with ops.backend(backend):
        if level:
            backends.native().set_level(level)
        try:
            yield request.param
        finally:
            if level:
                backends.native().set_level(before)


def random_values(bits: int) -> Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, (COUNT,), dtype=torch.int8, device="cuda" if CUDA else "cpu")


def numpy_pack(values: Tensor, bits: int) -> Tensor:
    columns = np.unpackbits(values.numpy().view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(columns, bitorder="little"))


def numpy_unpack(packed: Tensor, bits: int) -> Tensor:
    columns = np.unpackbits(packed.numpy(), count=COUNT * bits, bitorder="little").reshape(COUNT, bits)
    loose = np.packbits(columns, axis=1, bitorder="little").reshape(COUNT).view(np.int8)
    return torch.from_numpy((loose << (8 - bits)) >> (8 - bits))


def beside(function: Callable[[Tensor, int], Tensor], bits: int) -> dict[str, Callable[[Tensor], Tensor]]:
    return {} if CUDA else {"numpy": lambda values: function(values, bits)}


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_pack_bits(measure, path, bits):
    measure(
        "pack_bits",
        f"{bits} bits",
        shape=f"{COUNT >> 20} Mi values",
        dtype="int8",
        backend=path,
        make=lambda: (random_values(bits),),
        call=lambda values: ops.pack_bits(values, bits),
        others=beside(numpy_pack, bits),
        work=Work(bytes=COUNT + COUNT * bits // 8),
    )


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_unpack_bits(measure, path, bits):
    measure(
        "unpack_bits",
        f"{bits} bits",
        shape=f"{COUNT >> 20} Mi values",
        dtype="int8",
        backend=path,
        make=lambda: (ops.pack_bits(random_values(bits), bits),),
        call=lambda packed: ops.unpack_bits(packed, bits, COUNT),
        others=beside(numpy_unpack, bits),
        work=Work(bytes=COUNT + COUNT * bits // 8),
    )
