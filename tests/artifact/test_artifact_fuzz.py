"""Damaged and hostile artifacts end in `ArtifactError`, soon and in little memory.

The files are read by a second process (this file run as a program) whose address space is held to 200 MB above what it
needs to start, so an allocation beyond that is a MemoryError and fails the test.
"""

import copy
import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile_artifacts import hostile_files, open_up, sign

import pgolf
from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.errors import ArtifactError

CORRUPTIONS = 2000
SIGNED_MUTATIONS = 1000
MEMORY_BYTES = 200_000_000
SECONDS = 1.0


def sample_model():
    """About a megabyte when stored."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randint(-128, 128, (1024, 512), generator=generator).to(torch.int8)
    bank = torch.randint(-32, 32, (4, 256, 400), generator=generator).to(torch.int8)
    small = (torch.randn(3, 8, 40, generator=generator) * 6).round().clamp(-16, 15).to(torch.int8)
    # fmt: off
    return [
        StoredTensor("embedding", "embedding", (1024, 512), embedding, torch.rand(1024, generator=generator).half(), 8),
        StoredTensor("bank", "mlp", (4, 256, 400), bank, torch.rand(4, 256, generator=generator).half(), 6),
        StoredTensor("small", "attention", (3, 8, 40), small, torch.rand(3, 8, generator=generator).half(), 5),
        StoredTensor("path", "mlp", (3, 8, 40), small, torch.rand(3, 8, generator=generator).half(), 5,
                     torch.randint(0, 4, (3, 40), generator=generator).to(torch.int8), 8),
        StoredTensor("gain", "control", (30,), torch.rand(30, generator=generator).half(), None, 16),
        StoredTensor("mix", "control", (), torch.rand((), generator=generator), None, 32),
    ]


def corrupt(data, chance):
    """One random corruption: a flipped bit or more bytes, a truncation, an excision, an insertion, a spliced length."""
    data = bytearray(data)
    kind = chance.randrange(7)
    at = chance.choice([chance.randrange(len(data)), chance.randrange(min(len(data), 2000))])
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + chance.choice([1, 4, 8, 1000])]
    elif kind == 4:
        data[at:at] = chance.randbytes(chance.choice([1, 4, 8, 1000]))
    elif kind == 5:  # a length of the header or of a stream
        (stored_size,) = struct.unpack_from("<I", data, 12)
        places, at = [8, 12, 16], 24 + stored_size
        while at < len(data):
            places.append(at)
            at += 8 + struct.unpack_from("<I", data, at)[0]
        place = chance.choice(places)
        (length,) = struct.unpack_from("<I", data, place)
        wrong = [0, 1, length + 1, max(length - 1, 0), length ^ 1 << chance.randrange(32), 2**31, 2**32 - 1]
        struct.pack_into("<I", data, place, chance.choice([each for each in wrong if each != length]))
    else:  # one piece of the file over another
        size = chance.choice([4, 24, 1000])
        data[at : at + size] = data[chance.randrange(len(data) - size) :][:size]
    return bytes(data)


JUNK = [
    *(None, True, False, 0, 1, -1, 2, 8, 16, 32, 2**31, 2**63, 0.5, 1e300, "", "w", "mlp"),
    *([], [[]], {}, {"a": 1}, [4, 8], [0], [2**20, 2**20], [2**27]),
]


def mutate_and_sign(data, chance):
    """Change the manifest or a stored stream at random, and sign the result, so that only the later checks are left."""
    described, pieces = copy.deepcopy(open_up(data))
    if chance.random() < 0.5:
        index = chance.randrange(len(pieces))
        piece = bytearray(pieces[index] or b"\0")
        for _ in range(chance.randrange(1, 4)):
            piece[chance.choice([0, chance.randrange(len(piece)), chance.randrange(min(len(piece), 16))])] ^= (
                1 << chance.randrange(8)
            )
        pieces[index] = bytes(piece)
    else:
        value = described
        while True:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = chance.choice(keys) if keys else None
            if key is None or not isinstance(value[key], dict | list) or chance.random() < 0.2:
                break
            value = value[key]
        if key is None:
            described["metadata"] = chance.choice(JUNK)
        elif chance.random() < 0.2:
            del value[key]
        else:
            value[key] = chance.choice(JUNK)
    return sign(described, pieces)


def read_here(path):
    """How reading `path` ended: error type or "", message, CPU seconds, which others at work do not lengthen."""
    start = time.process_time()
    try:
        for each in read_artifact(path).tensors.values():
            each.dequantize(torch.float16)
        kind, message = "", ""
    except BaseException as error:
        kind, message = type(error).__name__, str(error)
    return kind, message, time.process_time() - start


def judge(folder):
    """The second process: read every file of `folder`, then corruptions of its good one, in bounded memory."""
    import resource

    torch.set_num_threads(1)
    good = folder / "good.pgolf"
    data = good.read_bytes()
    assert read_here(good)[0] == ""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        bytearray(MEMORY_BYTES * 5 // 4)
        raise SystemExit("the limit on memory does not hold")
    except MemoryError:
        pass
    results = {path.stem: read_here(path) for path in sorted(folder.glob("hostile*"))}
    trial = folder / "trial.pgolf"
    small = (folder / "small.pgolf").read_bytes()
    for kind, count, whole, spoil in (
        ("corrupt", CORRUPTIONS, data, corrupt),
        ("signed", SIGNED_MUTATIONS, small, mutate_and_sign),
    ):
        for seed in range(count):
            spoilt = spoil(whole, random.Random(seed))
            if spoilt != whole:
                trial.write_bytes(spoilt)
                results[f"{kind}{seed}"] = read_here(trial)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def hostile():
    return hostile_files()


@pytest.fixture(scope="module")
def results(tmp_path_factory, hostile):
    if not sys.platform.startswith("linux"):
        pytest.skip("the bound on memory needs Linux")
    folder = tmp_path_factory.mktemp("hostile")
    write_artifact(folder / "good.pgolf", sample_model(), {"model": {"dim": 512}, "tokenizer": "demo"})
    write_artifact(folder / "small.pgolf", sample_model()[2:], {"model": {"dim": 512}, "tokenizer": "demo"})
    for index, (data, _) in enumerate(hostile.values()):
        (folder / f"hostile{index}.pgolf").write_bytes(data)
    root = Path(pgolf.__file__).parents[1]
    command = [sys.executable, __file__, str(folder)]
    # The limit is one of addresses, of which malloc reserves 64 MB a thread that decodes and touches hardly any.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parents[1]))),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_refused(result):
    kind, message, seconds = result
    assert kind == "ArtifactError", message
    assert "\n" not in message
    assert ".pgolf" in message
    assert len(message) < 500
    assert seconds < SECONDS


def test_hostile_files_with_correct_checksums(hostile, results):
    for index, (name, (_, expected)) in enumerate(hostile.items()):
        result = results[f"hostile{index}"]
        assert result[0] == "ArtifactError", f"{name}: {result}"
        assert expected in result[1], f"{name}: {result}"
        assert_refused(result)


def test_random_corruptions(results):
    found = [result for name, result in results.items() if name.startswith("corrupt")]
    assert len(found) > 0.99 * CORRUPTIONS  # a corruption may by chance leave the file as it was
    for result in found:
        assert_refused(result)
    assert len({message.split(":", 1)[1][:30] for _, message, _ in found}) >= 6


def test_random_mutations_with_correct_checksums(results):
    found = [result for name, result in results.items() if name.startswith("signed")]
    refused = [result for result in found if result[0]]
    assert len(found) > 0.9 * SIGNED_MUTATIONS
    assert len(refused) > 0.3 * len(found)  # the others are other weights, and as good a file as any
    for result in refused:
        assert_refused(result)


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "small.pgolf"
    values = (torch.arange(64).reshape(8, 8) % 13).to(torch.int8)
    weights = StoredTensor("w", "mlp", (8, 8), values, torch.ones(8).half(), 6)
    write_artifact(path, [weights, StoredTensor("g", "control", (2,), torch.ones(2), None, 32)], {})
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            read_artifact(path)


def test_every_truncation_and_every_exchange_of_streams_is_detected(tmp_path):
    path = tmp_path / "small.pgolf"
    values = torch.arange(-16, 16, dtype=torch.int8).reshape(4, 8)
    tensors = [
        StoredTensor(name, "mlp", (4, 8), values ^ add, torch.ones(4).half(), 6) for add, name in enumerate("ab")
    ]
    write_artifact(path, tensors, {})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            read_artifact(path)
    one, other, rest = (8 + len(piece) for piece in open_up(data)[1])
    start = len(data) - one - other - rest
    first, second = data[start : start + one], data[start + one : start + one + other]
    path.write_bytes(data[:start] + second + first + data[len(data) - rest :])
    with pytest.raises(ArtifactError, match="checksum"):
        read_artifact(path)


def test_files_that_are_not_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "below", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match=path.name):
            read_artifact(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe"):
        read_artifact(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match="limit"):
        read_artifact(tmp_path / "sparse")


def test_reading_survives_a_name_with_a_line_break(tmp_path):
    path = tmp_path / "two\nlines.pgolf"
    path.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    judge(Path(sys.argv[1]))
