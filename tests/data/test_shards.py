import numpy as np
import pytest

from pgolf.data.shards import find_shards, find_sidecars, read_shard, read_token_count, write_shard
from pgolf.errors import DataError


def test_the_format_byte_for_byte(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, [1, 2, 65535, 258])
    raw = path.read_bytes()
    assert len(raw) == 1024 + 2 * 4
    assert raw[:12] == bytes.fromhex("88d8340101000000" + "04000000")  # 20240520, 1, 4
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == bytes.fromhex("0100 0200 ffff 0201")
    assert int.from_bytes(raw[:4], "little") == 20240520


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64, ">u2"])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_round_trip(tmp_path, dtype, count):
    tokens = np.random.default_rng(count).integers(0, 65536 if dtype != np.int64 else 1024, count).astype(dtype)
    write_shard(tmp_path / "a.bin", tokens)
    back = read_shard(tmp_path / "a.bin")
    assert back.dtype == np.dtype("<u2")
    np.testing.assert_array_equal(back, tokens)
    assert read_token_count(tmp_path / "a.bin") == count
    assert not back.flags.writeable


def test_reading_is_a_memory_map(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(10))
    assert isinstance(read_shard(tmp_path / "a.bin"), np.memmap)


def test_strided_tokens(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100, dtype=np.uint16)[::3])
    np.testing.assert_array_equal(read_shard(tmp_path / "a.bin"), np.arange(0, 100, 3))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 65536], r"token 65536 at index 1 is outside 0\.\.65535"),
        ([3, 4, -1], r"token -1 at index 2 is outside 0\.\.65535"),
        ([0.5], "1-D integer array, not 1-D float64"),
        ([[1, 2]], "1-D integer array, not 2-D int64"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_leave_no_file(tmp_path, tokens, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def _header(*values: int) -> bytes:
    return np.array([*values, *[0] * (256 - len(values))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header ends at byte 0"),
        (_header(20240520, 1, 0)[:1023], "header ends at byte 1023"),
        (_header(20240521, 1, 1) + bytes(2), "byte 0: magic number 20240521, a token shard has 20240520"),
        (_header(20240520, 2, 1) + bytes(2), "byte 4: version 2, only version 1"),
        (_header(20240520, 1, -1), "byte 8: -1 tokens, the count must be 0 or more"),
        (_header(20240520, 1, 5) + bytes(8), "byte 8: 5 tokens make a file of 1034 bytes, this one has 1032"),
        (_header(20240520, 1, 5) + bytes(11), "byte 8: 5 tokens make a file of 1034 bytes, this one has 1035"),
        (_header(20240520, 1, 2**31 - 1) + bytes(2), "this one has 1026"),
    ],
)
def test_wrong_files_are_refused_by_name_and_offset(tmp_path, raw, message):
    path = tmp_path / "bad_train_000000.bin"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(DataError, match="directory"):
        read_shard(tmp_path)


def test_finding_shards(tmp_path):
    for name in ("b_val_000001", "b_val_000000", "b_train_000000", "b_val_bytes_000000", ".b_val_000002"):
        write_shard(tmp_path / f"{name}.bin", [1])
    (tmp_path / "b_train_000001.txt").touch()
    assert [path.name for path in find_shards(tmp_path, "val")] == ["b_val_000000.bin", "b_val_000001.bin"]
    assert [path.name for path in find_shards(tmp_path, "train")] == ["b_train_000000.bin"]
    assert [path.name for path in find_sidecars(tmp_path)] == ["b_val_bytes_000000.bin"]
    with pytest.raises(ValueError, match="split must be one of"):
        find_shards(tmp_path, "test")
    with pytest.raises(DataError, match="no data folder"):
        find_shards(tmp_path / "nowhere", "train")
