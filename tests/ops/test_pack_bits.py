"""Bit packing: exact round trips, the documented layout, every backend the same bytes, hostile input refused."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import need

from pgolf import ops
from pgolf.ops.pack_bits import pack_bits_reference, packed_size, unpack_bits_reference

BACKENDS = ("reference", "native")
WIDTHS = range(1, 9)


def random_values(shape, bits: int, signed: bool = True) -> torch.Tensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return torch.randint(low, high, shape, dtype=torch.int8 if signed else torch.uint8)


def pack_one_bit_at_a_time(values: list[int], bits: int) -> bytes:
    """The layout as the docstring tells it, with Python's big integers."""
    stream = 0
    for i, value in enumerate(values):
        stream |= (value % 2**bits) << (i * bits)
    return stream.to_bytes((len(values) * bits + 7) // 8, "little")


@given(bits=st.sampled_from(WIDTHS), signed=st.booleans(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_layout_is_the_documented_one_and_the_round_trip_is_exact(bits, signed, data):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=70))
    tensor = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8)
    for backend in BACKENDS:
        if not ops.available()["pack_bits"][backend].ok:
            continue
        with ops.backend(backend):
            packed = ops.pack_bits(tensor, bits)
            assert bytes(packed.tolist()) == pack_one_bit_at_a_time(values, bits)
            assert torch.equal(ops.unpack_bits(packed, bits, len(values), signed), tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.usefixtures("poisoned")
def test_long_streams_agree_with_the_definition(backend, bits):
    need("pack_bits", backend)
    for signed in (True, False):
        values = random_values((3, 70_001), bits, signed)
        with ops.backend(backend):
            packed = ops.pack_bits(values, bits)
            back = ops.unpack_bits(packed, bits, values.shape, signed)
        assert packed.dtype == torch.uint8
        assert packed.shape == (packed_size(values.numel(), bits),)
        assert torch.equal(packed, pack_bits_reference(values, bits))
        assert torch.equal(back, values)
        assert back.dtype == values.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_empty_input(backend):
    need("pack_bits", backend)
    with ops.backend(backend):
        values = random_values((24, 31), 5)
        turned = values.t()
        assert torch.equal(ops.pack_bits(turned, 5), ops.pack_bits(turned.contiguous(), 5))
        stepped = values[::3, 1::2]
        assert torch.equal(ops.unpack_bits(ops.pack_bits(stepped, 5), 5, stepped.shape), stepped)
        everywhere_the_same = values[:1, :1].expand(9, 7)
        assert torch.equal(ops.unpack_bits(ops.pack_bits(everywhere_the_same, 5), 5, (9, 7)), everywhere_the_same)
        packed = ops.pack_bits(values, 5)
        apart = torch.stack([packed, packed], dim=1)[:, 0]
        assert torch.equal(ops.unpack_bits(apart, 5, values.shape), values)
        for shape in ((0,), (3, 0, 2)):
            empty = ops.pack_bits(torch.empty(shape, dtype=torch.int8), 3)
            assert empty.shape == (0,)
            assert ops.unpack_bits(empty, 3, shape).shape == shape
        single = ops.pack_bits(torch.tensor(-3, dtype=torch.int8), 3)
        assert ops.unpack_bits(single, 3, ()).item() == -3


@pytest.mark.parametrize("backend", BACKENDS)
def test_pad_bits_are_written_as_zero_and_not_read(backend):
    need("pack_bits", backend)
    with ops.backend(backend):
        packed = ops.pack_bits(torch.full((3,), -1, dtype=torch.int8), 3)
        assert packed.tolist() == [0xFF, 0x01]
        assert ops.unpack_bits(torch.tensor([0xFF, 0xFF], dtype=torch.uint8), 3, 3).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        ([3, 4], 3, "4 does not fit in 3 bits; accepted for int8 are -4 to 3"),
        ([-5, 0], 3, "-5 does not fit"),
        ([1], 1, "accepted for int8 are -1 to 0"),
    ],
)
def test_values_out_of_range_are_refused(backend, values, bits, message):
    need("pack_bits", backend)
    with ops.backend(backend), pytest.raises(ValueError, match=message):
        ops.pack_bits(torch.tensor(values, dtype=torch.int8), bits)
    with ops.backend(backend), pytest.raises(ValueError, match="accepted for uint8 are 0 to 7"):
        ops.pack_bits(torch.tensor([8], dtype=torch.uint8), 3)
    among_many = random_values((700_001,), 6)
    among_many[random.randrange(700_001)] = 32
    with ops.backend(backend), pytest.raises(ValueError, match="32 does not fit in 6 bits"):
        ops.pack_bits(among_many, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_bits([1, 2], 3), TypeError, "values: expected a torch.Tensor, got list"),
        (lambda: ops.pack_bits(torch.zeros(3), 3), TypeError, "values: dtype torch.float32.*int8, uint8"),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.int8), 9), ValueError, "bits: 9 .* 1 to 8"),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.int8), 2.0), TypeError, "bits: expected an int, got float"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.int8), 3, 8), TypeError, "packed: dtype"),
        (lambda: ops.unpack_bits(torch.zeros(2, dtype=torch.uint8), 3, 8), ValueError, "2 bytes, expected 3"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, (-8,)), ValueError, "shape: .* 0 or more"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, (8.0,)), TypeError, "shape: expected ints"),
        (lambda: ops.unpack_bits(torch.zeros(3, 1, dtype=torch.uint8), 3, 8), ValueError, "one dimension"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 8, signed=1), TypeError, "signed"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 0, 8), ValueError, "bits: 0"),
        (lambda: torch.ops.pgolf.unpack_bits(torch.zeros(2, dtype=torch.uint8), 3, [8], True), ValueError, "2 bytes"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    need("pack_bits", backend)
    values = random_values((5, 13), 6)
    with ops.backend(backend):
        packed = ops.pack_bits(values, 6)
        torch.library.opcheck(torch.ops.pgolf.pack_bits.default, (values, 6))
        torch.library.opcheck(torch.ops.pgolf.unpack_bits.default, (packed, 6, [5, 13], True))
    assert ops.pack_bits(values.to("meta"), 6).shape == packed.shape
    assert ops.unpack_bits(packed.to("meta"), 6, (5, 13)).dtype == torch.int8


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic):
    def round_trip(values):
        return ops.unpack_bits(ops.pack_bits(values, 6), 6, values.shape)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 33), (7, 12)):
        values = random_values(shape, 6)
        assert torch.equal(compiled(values), values)
    with pytest.raises(ValueError, match="does not fit in 6 bits"):
        compiled(torch.full((4, 33), 100, dtype=torch.int8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_on_the_gpu(backend, bits):
    need("pack_bits", backend, "cuda")
    for shape in ((0,), (5,), (3, 70_001)):
        values = random_values(shape, bits)
        with ops.backend(backend):
            packed = ops.pack_bits(values.cuda(), bits)
            back = ops.unpack_bits(packed, bits, shape)
        assert torch.equal(packed.cpu(), pack_bits_reference(values, bits))
        assert torch.equal(back.cpu(), unpack_bits_reference(packed.cpu(), bits, shape))
