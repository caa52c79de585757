"""pgolf._native: bit packing against a plain numpy definition, on every code path that this CPU runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgolf
from pgolf import _native as native

ROOT = Path(__file__).parents[2]
WIDTHS = range(1, 9)
GUARD = 64
POISON = 0xA5


def packed_size(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def define_pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bit j of value i is bit i * bits + j of the stream."""
    stream = (values.view(np.uint8)[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).ravel(), bitorder="little")


def define_unpack(packed: np.ndarray, count: int, bits: int, signed: bool) -> np.ndarray:
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    values = (stream.astype(np.int64) << np.arange(bits)).sum(axis=1)
    if signed:
        values -= (values >> (bits - 1)) << bits
    return values.astype(np.int8 if signed else np.uint8)


class Guarded:
    """`size` poisoned bytes, `offset` bytes off alignment, between guards that must stay as they are."""

    def __init__(self, size: int, offset: int = 0):
        self.whole = np.full(GUARD + offset + size + GUARD, POISON, np.uint8)
        self.bytes = self.whole[GUARD + offset : GUARD + offset + size]
        self.address = self.whole.ctypes.data + GUARD + offset

    def taken(self) -> np.ndarray:
        start = self.address - self.whole.ctypes.data
        assert (self.whole[:start] == POISON).all(), "written before the buffer"
        assert (self.whole[start + len(self.bytes) :] == POISON).all(), "written past the buffer"
        return self.bytes


def pack(values: np.ndarray, bits: int, threads: int = 1, offset: int = 0) -> np.ndarray:
    source, target = Guarded(len(values), offset), Guarded(packed_size(len(values), bits), offset)
    source.bytes[:] = values.view(np.uint8)
    fits = native.pack_bits(source.address, target.address, len(values), bits, values.dtype == np.int8, threads)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if values.dtype == np.int8 else (0, (1 << bits) - 1)
    assert fits is bool(((values >= low) & (values <= high)).all())
    assert (source.taken() == values.view(np.uint8)).all()
    return target.taken()


def unpack(packed: np.ndarray, count: int, bits: int, signed: bool, threads: int = 1, offset: int = 0) -> np.ndarray:
    source, target = Guarded(len(packed), offset), Guarded(count, offset)
    source.bytes[:] = packed
    native.unpack_bits(source.address, target.address, count, bits, signed, threads)
    assert (source.taken() == packed).all()
    return target.taken().view(np.int8 if signed else np.uint8)


@pytest.fixture(autouse=True)
def restore_level():
    chosen = native.level()
    yield
    native.set_level(chosen)


@pytest.fixture(params=native.levels())
def level(request):
    native.set_level(request.param)
    return request.param


@pytest.fixture
def random():
    return np.random.default_rng()


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_short_length(level, bits, random):
    for count in range(201):
        values = random.integers(0, 256, count, dtype=np.uint8)  # bits above the width must not matter
        packed = pack(values, bits, offset=count % 9)
        np.testing.assert_array_equal(packed, define_pack(values, bits))
        for signed in (False, True):
            restored = unpack(packed, count, bits, signed, offset=count % 7)
            np.testing.assert_array_equal(restored, define_unpack(packed, count, bits, signed))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_long_lengths(level, bits, threads, random):
    count = int(random.integers(900_000, 1_000_000))  # enough for three threads to get a share
    values = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), count, dtype=np.int8)
    packed = pack(values, bits, threads, offset=1)
    np.testing.assert_array_equal(packed, define_pack(values, bits))
    np.testing.assert_array_equal(unpack(packed, count, bits, True, threads, offset=3), values)
    unsigned = values.view(np.uint8) & ((1 << bits) - 1)
    np.testing.assert_array_equal(unpack(packed, count, bits, False, threads), unsigned)


@given(
    data=st.binary(max_size=700), bits=st.integers(1, 8), signed=st.booleans(), offset=st.integers(0, 15),
    level=st.sampled_from(native.levels()), threads=st.integers(1, 5),
)  # fmt: skip
def test_any_bytes_pack_and_unpack(data, bits, signed, offset, level, threads):
    native.set_level(level)
    data = np.frombuffer(data, np.uint8)
    np.testing.assert_array_equal(pack(data, bits, threads, offset), define_pack(data, bits))
    # As a stream: the longest count that it holds, whatever its pad bits are.
    count = len(data) * 8 // bits
    stream = data[: packed_size(count, bits)]
    restored = unpack(stream, count, bits, signed, threads, offset)
    np.testing.assert_array_equal(restored, define_unpack(stream, count, bits, signed))


@pytest.mark.parametrize("bits", WIDTHS)
def test_pad_bits_are_zero_and_extremes_survive(level, bits):
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = np.array([lowest, highest, -1 if bits > 1 else lowest] * 5, np.int8)
    packed = pack(values, bits)
    np.testing.assert_array_equal(unpack(packed, len(values), bits, True), values)
    assert int.from_bytes(packed.tobytes(), "little") >> (len(values) * bits) == 0


def test_the_layout_is_the_documented_one(level):
    # 1, 2, 3 in three bits each: 011 010 001, least significant first.
    assert pack(np.array([1, 2, 3], np.uint8), 3).tolist() == [0b11010001, 0b0]
    assert pack(np.array([-1, 0, -32, 31], np.int8), 6).tolist() == [0b00111111, 0b00000000, 0b01111110]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 8))
def test_one_value_that_does_not_fit_is_seen_wherever_it_is(level, bits, signed, random):
    dtype, half = (np.int8, 1 << (bits - 1)) if signed else (np.uint8, 0)
    low, high = -half, (1 << bits) - 1 - half
    outside = [value for value in (low - 1, high + 1, -128, 127, 255) if not low <= value <= high]
    outside = [value for value in outside if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max]
    for count, threads in ((1, 1), (150, 1), (600_000, 2)):
        values = random.integers(low, high, count, dtype=dtype, endpoint=True)
        for at in {0, count - 1, *random.integers(0, count, 2 if count > 1000 else 12).tolist()}:
            kept = values[at]
            values[at] = random.choice(outside)
            pack(values, bits, threads)
            values[at] = kept
        pack(values, bits, threads)


def test_nothing_at_no_address_is_fine(level):
    assert native.pack_bits(0, 0, 0, 6) is True
    assert native.unpack_bits(0, 0, 0, 6, True) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits is 0, accepted is 1 to 8"),
        ({"bits": 9}, "bits is 9, accepted is 1 to 8"),
        ({"bits": -(1 << 40)}, "bits is -1099511627776, accepted is 1 to 8"),
        ({"count": -1}, "count is -1, accepted is 0 or more"),
        ({"threads": 0}, "threads is 0, accepted is 1 or more"),
        ({"src": 0}, "src is 0, accepted is an address, or 0 with a count of 0"),
        ({"dst": 0}, "dst is 0, accepted is an address, or 0 with a count of 0"),
    ],
)
@pytest.mark.parametrize("name", ["pack_bits", "unpack_bits"])
def test_wrong_arguments_are_named(name, change, message):
    source, target = Guarded(16), Guarded(16)
    arguments = {"src": source.address, "dst": target.address, "count": 8, "bits": 6, "threads": 1, **change}
    arguments["signed"] = True
    with pytest.raises(ValueError) as caught:
        getattr(native, name)(**arguments)
    assert str(caught.value) == message
    assert (target.taken() == POISON).all()


def gptq_arguments(name: str) -> dict[str, int]:
    """Arguments of 2 matrices of 3 rows and 4 columns, each at an address where nothing is touched before a check."""
    address = Guarded(8).address
    given = {
        "check_hessians": ("hessians",),
        "factor_hessians": ("hessians", "order", "diagonal", "factors"),
        "round_columns": ("weight", "order", "factors", "scale", "values"),
        "refine": ("weight", "hessians", "values", "scale"),
    }[name]
    sizes = {
        "check_hessians": {"tolerance": 1e-3},
        "factor_hessians": {"which": [0, 1]},
        "round_columns": {"rows": 3, "limit": 31},
        "refine": {"rows": 3, "limit": 31, "sweeps": 1, "refits": 1},
    }[name]
    return {**dict.fromkeys(given, address), "count": 2, "n": 4, "threads": 1, **sizes}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("check_hessians", {"count": -1}, "count is -1, accepted is 0 or more"),
        ("check_hessians", {"n": 0}, "n is 0, accepted is 1 to 16777216"),
        ("check_hessians", {"hessians": 0}, "hessians is 0, accepted is an address, or 0 with a count of 0"),
        ("check_hessians", {"threads": 0}, "threads is 0, accepted is 1 or more"),
        ("factor_hessians", {"which": [0, 2]}, "which is 2, accepted is 0 to count - 1"),
        ("factor_hessians", {"factors": 0}, "order, diagonal or factors is 0, accepted is an address"),
        ("factor_hessians", {"n": 1 << 40}, "n is 1099511627776, accepted is 1 to 16777216"),
        ("round_columns", {"limit": 128}, "limit is 128, accepted is 1 to 127"),
        ("round_columns", {"rows": -1}, "rows is -1, accepted is 0 or more"),
        ("round_columns", {"scale": 0}, "weight, order, factors, scale or values is 0, accepted is an address"),
        ("refine", {"limit": 0}, "limit is 0, accepted is 1 to 127"),
        ("refine", {"sweeps": -1}, "sweeps is -1, accepted is 0 to 1048576"),
        ("refine", {"refits": -1}, "refits is -1, accepted is 0 to 1048576"),
        ("refine", {"values": 0}, "weight, hessians, values or scale is 0, accepted is an address"),
    ],
)
def test_wrong_arguments_of_gptq_are_named(name, change, message):
    with pytest.raises(ValueError) as caught:
        getattr(native, name)(**{**gptq_arguments(name), **change})
    assert str(caught.value) == message


def test_nothing_to_round_is_fine(level):
    for name in ("check_hessians", "round_columns", "refine"):
        assert not getattr(native, name)(**{**gptq_arguments(name), "count": 0})
    assert native.factor_hessians(**{**gptq_arguments("factor_hessians"), "which": []}) == []


def test_gptq_stays_within_its_buffers(level, random):
    for n, rows in ((1, 1), (33, 5), (40, 70)):
        x = random.standard_normal((3 * n, n), dtype=np.float32)
        hessian, weight = np.ascontiguousarray(x.T @ x), random.standard_normal((rows, n), dtype=np.float32)
        order, diagonal = np.arange(n)[::-1].copy(), np.diag(hessian) + 1
        scale = np.full(rows, 0.125, np.float32)
        factors, values = Guarded(4 * native.factor_size(n)), Guarded(rows * n, offset=3)
        at = [array.ctypes.data for array in (hessian, order, diagonal)]
        assert native.factor_hessians(at[0], 1, n, at[1], at[2], [0], factors.address) == []
        pointers = (weight.ctypes.data, at[1], factors.address, scale.ctypes.data, values.address)
        native.round_columns(*pointers, 1, rows, n, 31)
        factors.taken()
        before = values.taken().view(np.int8).copy()
        assert (np.abs(before) <= 31).all()
        fitted = Guarded(4 * rows)
        fitted.bytes[:] = scale.view(np.uint8)
        native.refine(weight.ctypes.data, at[0], values.address, fitted.address, 1, rows, n, 31, 3, 2)
        assert (np.abs(values.taken().view(np.int8)) <= 31).all()
        assert (fitted.taken().view(np.float32) > 0).all()


def test_levels():
    assert native.levels()[0] == "portable"
    for name in native.levels():
        native.set_level(name)
        assert native.level() == native.build_info()["cpu_level"] == name
    with pytest.raises(ValueError, match=r"^level is 'fastest', this CPU accepts: portable"):
        native.set_level("fastest")
    assert native.level() == native.levels()[-1]


def test_build_info():
    info = native.build_info()
    assert info["version"] == pgolf.__version__
    assert info["build_type"] == "Release"
    name, version = info["compiler"].split()
    assert name
    assert version[0].isdigit()
    assert info["cpu_level"] in native.levels()
    assert {"bmi2", "avx512vbmi"}.intersection(native.levels()) <= set(info["cpu_features"])
    assert info["cuda_devices"] >= 0
    assert info["cuda"] is hasattr(native, "pack_bits_cuda") is hasattr(native, "unpack_bits_cuda")
    assert info["cuda"] is hasattr(native, "round_block_cuda")
    if info["cuda"]:
        assert info["cuda_reason"] == ""
        assert float(info["cuda_version"]) >= 11
        assert all(arch[:2].isdigit() for arch in info["cuda_archs"])
        assert info["cuda_archs"]
    else:
        assert "\n" not in info["cuda_reason"]
        assert info["cuda_reason"]
        assert (info["cuda_version"], info["cuda_archs"], info["cuda_devices"]) == ("", [], 0)


@pytest.mark.skipif(not native.build_info()["cuda"], reason="the extension was built without CUDA")
@pytest.mark.skipif(native.build_info()["cuda_devices"] > 0, reason="a CUDA device is present")
def test_cuda_without_a_device_raises():
    source, target = Guarded(64), Guarded(64)
    with pytest.raises(RuntimeError, match=r"^CUDA: [^\n]+$"):
        native.pack_bits_cuda(source.address, target.address, 64, 6, 0)
    with pytest.raises(RuntimeError, match=r"^CUDA: [^\n]+$"):
        native.unpack_bits_cuda(source.address, target.address, 64, 6, True, 0)
    with pytest.raises(ValueError, match="bits is 9"):
        native.pack_bits_cuda(source.address, target.address, 64, 9, 0)
    assert (target.taken() == POISON).all()


@pytest.mark.gpu
@pytest.mark.skipif(native.build_info()["cuda_devices"] == 0, reason="no CUDA build or no CUDA device")
@pytest.mark.parametrize("offset", [0, 16, 4, 1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_cuda_equals_the_cpu(bits, offset, random):
    import torch

    for count in [*range(1, 100), 4096, int(random.integers(3_000_000, 4_000_000))]:
        values = random.integers(0, 256, count, dtype=np.uint8)
        size = packed_size(count, bits)
        source = torch.full((offset + count + GUARD,), POISON, dtype=torch.uint8, device="cuda")
        source[offset : offset + count] = torch.from_numpy(values).cuda()
        packed = torch.full((offset + size + GUARD,), POISON, dtype=torch.uint8, device="cuda")
        restored = torch.full_like(source, POISON)
        stream = torch.cuda.current_stream().cuda_stream
        native.pack_bits_cuda(source.data_ptr() + offset, packed.data_ptr() + offset, count, bits, stream)
        expected = define_pack(values, bits)
        np.testing.assert_array_equal(packed[offset : offset + size].cpu().numpy(), expected)
        for signed in (False, True):
            native.unpack_bits_cuda(
                packed.data_ptr() + offset, restored.data_ptr() + offset, count, bits, signed, stream
            )
            got = restored[offset : offset + count].cpu().numpy().view(np.int8 if signed else np.uint8)
            np.testing.assert_array_equal(got, define_unpack(expected, count, bits, signed))
        for buffer, length in ((packed, size), (restored, count)):
            assert (buffer[:offset] == POISON).all(), "written before the buffer"
            assert (buffer[offset + length :] == POISON).all(), "written past the buffer"


@pytest.mark.parametrize("name", native.levels())
def test_a_level_for_a_whole_process(name):
    code = "from pgolf import _native; print(_native.level())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PGOLF_CPU_LEVEL": name}, capture_output=True, text=True
    )
    assert done.stdout == f"{name}\n", done.stderr


def test_a_level_that_is_none_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env={**os.environ, "PGOLF_CPU_LEVEL": "sse"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    accepted = ", ".join(native.levels())
    assert done.stderr == f"train_gpt.py: PGOLF_CPU_LEVEL: level is 'sse', this CPU accepts: {accepted}\n"
