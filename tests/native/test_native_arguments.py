"""pgolf._native refuses sizes and indices that do not fit, by name, though pgolf.ops never gives any such."""

import numpy as np
import pytest

from pgolf import _native as native

BIG = "accepted is what makes at most 2^48 with the others"
COLUMNS = np.zeros(64, np.float32)  # room for every array of the calls below that is looked at
AT = COLUMNS.ctypes.data


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # products that wrapped around to 0, and so passed for nothing to be done
        (lambda: native.round_columns(0, 0, 0, 0, 0, 1 << 62, 4, 4, 31), f"size is {1 << 62}, {BIG}"),
        (lambda: native.refine(0, 0, 0, 0, 1 << 62, 4, 4, 31, 1, 1), f"size is {1 << 62}, {BIG}"),
        (lambda: native.check_hessians(AT, 1 << 62, 4, 1e-3), f"size is {1 << 62}, {BIG}"),
        (lambda: native.trellis_search(0, AT, AT, AT, 0, 1 << 62, 4, 8, 31), f"size is {1 << 62}, {BIG}"),
        (lambda: native.trellis_dequantize(0, 0, AT, 0, 1 << 31, 1 << 31, 4, 8), f"size is {1 << 31}, {BIG}"),
        (lambda: native.unpack_bits(AT, AT, (1 << 63) - 1, 8, True), f"size is {(1 << 63) - 1}, {BIG}"),
        (lambda: native.factor_size(1 << 40), f"n is {1 << 40}, accepted is 1 to 16777216"),
        (lambda: native.factor_size(-1), "n is -1, accepted is 1 to 16777216"),
    ],
)
def test_sizes_that_overflow_are_refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("wrong", [-1, 2, 1 << 40])
def test_columns_that_are_none_are_refused(wrong):
    order, out = np.array([0, wrong], np.int64), np.zeros(native.factor_size(2), np.float32)
    message = f"^order is {wrong}, accepted is 0 to n - 1$"
    with pytest.raises(ValueError, match=message):
        native.factor_hessians(AT, 1, 2, order.ctypes.data, AT, [0], out.ctypes.data)
    with pytest.raises(ValueError, match=message):
        native.round_columns(AT, order.ctypes.data, out.ctypes.data, AT, out.ctypes.data, 1, 2, 2, 31)


def test_no_rows_need_no_address():
    assert native.refine(0, 0, 0, 0, 3, 0, 4, 31, 1, 1) is None
    assert native.round_columns(0, 0, 0, 0, 0, 3, 0, 4, 31) is None
    assert native.trellis_dequantize(0, AT, 0, 0, 2, 3, 0, 8) is None
    assert native.trellis_dequantize(0, AT, 0, 0, 1 << 20, 1 << 28, 0, 8) is None  # at once


@pytest.mark.parametrize(
    ("tensors", "states", "message"),
    [
        ([((4,), 1, 3)], 0, "low is 1, accepted is at most the least value, 0 without any"),
        ([((4,), 0, 2)], 0, "high is 2, accepted is at least the greatest value, 0 without any"),
        ([((4,), 0, 3), ((0,), 0, 1)], 0, "high is 1, accepted is at least the greatest value, 0 without any"),
        ([((2, 1 << 16 | 1), 0, 3)], 8, "columns is 65537, accepted is at most 65536 with a trellis"),
    ],
)
@pytest.mark.parametrize("is_static", [False, True])
def test_values_beyond_their_bounds_are_not_encoded(tensors, states, message, is_static):
    """The static coder counted them outside its table."""
    values = np.arange(4, dtype=np.int8)
    with pytest.raises(ValueError) as caught:
        native.encode_ints(values.ctypes.data, tensors, True, is_static, states, 1)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^tensors is 2, accepted is 1 where there is no list$"):
        native.encode_ints(values.ctypes.data, [((1,), 0, 0)] * 2, False, is_static, 0, 1)


def test_tokens_beyond_the_vocabulary_are_refused():
    tokens, floats = np.array([1, 2, 10, 3], np.uint16), np.full(4, -1.0)
    cache = native.NgramCache(10, [2, 3], 0, 1.0, 0.5, -1, False, 1 << 20)
    hints = native.HintCache(10, 3, 0.5, -1, False, 1 << 20)
    before = cache.save(), hints.save()
    for call in (
        lambda: cache.update(tokens.ctypes.data, 4),
        lambda: cache.score(tokens.ctypes.data, floats.ctypes.data, floats.ctypes.data, 4),
        lambda: hints.update(tokens.ctypes.data, 4),
        lambda: hints.hints(tokens.ctypes.data, floats.ctypes.data, floats.ctypes.data, 4),
    ):
        with pytest.raises(ValueError, match=r"^token is 10, accepted is 0 to vocab_size - 1$"):
            call()
    assert (cache.save(), hints.save()) == before
    with pytest.raises(ValueError, match=f"^order is {-(1 << 31)}, accepted is 2 to 16$"):
        native.HintCache(10, -(1 << 31), 0.5, -1, False, 1 << 20)


@pytest.mark.skipif(not native.build_info()["cuda"], reason="the extension was built without CUDA")
def test_a_block_beyond_the_columns_is_refused():
    with pytest.raises(ValueError, match=r"^start is 9223372036854775807, accepted is 0 to n - width$"):
        native.round_block_cuda(AT, AT, AT, AT, AT, AT, 1, 2, 4, (1 << 63) - 1, 4, 31, 0)
