"""Snapshots of pgolf.NgramCache: damaged, hostile and impossible ones are refused."""

import math
import os
import random
import subprocess

import numpy as np
import pytest
from native_drivers import build_sanitized, needs_compiler
from test_ngram_cache import SMALL, repetitive

from pgolf import NgramCache
from pgolf.evaluation.ngram_cache import MIXINGS

SEED = int(os.environ.get("PGOLF_TEST_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_damaged_snapshot_is_refused(rng, mixing):
    def fresh(**given):
        return NgramCache(**{"vocab_size": 60, "mixing": mixing, "memory_bytes": SMALL, **given})

    cache = fresh()
    cache.update(repetitive(rng, 2000, 60))
    whole = cache.snapshot()
    at = int(rng.integers(len(whole)))
    damaged = [b"", whole[:at], whole + b"\0", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]]
    for each in damaged:
        with pytest.raises(ValueError, match="snapshot"):
            cache.restore(each)
    assert cache.snapshot() == whole
    for other in (fresh(vocab_size=61), fresh(memory_bytes=2 * SMALL), fresh(boundary_token=3), fresh(orders=[5])):
        with pytest.raises(ValueError, match="other settings"):
            other.restore(whole)


@needs_compiler
def test_hostile_snapshots_under_the_sanitizers(tmp_path):
    """Changed at random, with the right checksum: refused, or as good as any. PGOLF_FUZZ times as many on request."""
    program = tmp_path / "driver"
    build_sanitized(program, "ngram_driver", "-O0")
    mutations = 40 * int(os.environ.get("PGOLF_FUZZ", "1"))
    done = subprocess.run([str(program), str(SEED), "16", str(mutations)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"seed {SEED}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    refused, accepted, longest = done.stdout.split()
    assert int(refused) > 0.5 * 16 * mutations
    assert int(accepted) > 0  # other weights, other numbers of what was refused
    assert float(longest) < 2


def snapshot_parts(cache, vocab_size):
    """(bytes before the contexts of one token, these (vocab_size, 16), what follows but the checksum)."""
    data = cache.snapshot()[:-8]
    weights = 8 + 16 * 12 * 8 * 16
    header = 80 + weights + 8 + 4 + 2 * (max(cache.orders) - 1) + 2 * cache.stats()["tokens"] + 48
    direct = np.frombuffer(data[header : header + 16 * vocab_size], np.uint8).reshape(vocab_size, 16)
    return data[:header], direct.copy(), data[header + 16 * vocab_size :]


def signed(*parts):
    """A snapshot of these parts, with FNV-1a of eight bytes at a time."""
    data, total = b"".join(bytes(part) for part in parts), 0xCBF29CE484222325
    for at in range(0, len(data) - 7, 8):
        total = (total ^ int.from_bytes(data[at : at + 8], "little")) * 0x100000001B3 % 2**64
        total ^= total >> 32
    for octet in data[len(data) - len(data) % 8 :]:
        total = (total ^ octet) * 0x100000001B3 % 2**64
    return data + total.to_bytes(8, "little")


def test_a_snapshot_that_no_cache_could_leave_is_refused(rng):
    """Among them an entry that says it is free, which was not looked at: `learn` wrote 7560 places into 1536."""
    cache = NgramCache(20, [2, 3], memory_bytes=70_000)
    cache.update(rng.integers(10, size=300))
    head, direct, rest = snapshot_parts(cache, 20)
    assert signed(head, direct.tobytes(), rest) == cache.snapshot()
    cache.restore(cache.snapshot())
    before = cache.snapshot()
    fields = np.dtype([("owner", "<u4"), ("token", "<u2"), ("distinct", "<u2"), ("total", "<u4"), ("first", "<u2"),
                       ("count", "<u2")])  # fmt: skip
    for field, value in [
        *(("owner", each) for each in (0, 1, 21, 2**31)),
        ("token", 11),
        *(("distinct", each) for each in (0, 1, 60000)),
        *(("total", each) for each in (0, 1, 7560, 2**32 - 1)),
        *(("first", each) for each in (20, 65535)),
        *(("count", each) for each in (0, 65535)),
    ]:
        changed = direct.copy()
        changed.view(fields)[3][field] = value
        with pytest.raises(ValueError, match="snapshot"):
            cache.restore(signed(head, changed.tobytes(), rest))
    free = direct.copy()
    free.view(fields)[15]["distinct"], free.view(fields)[15]["total"] = 9, 7560
    with pytest.raises(ValueError, match="snapshot"):
        cache.restore(signed(head, free.tobytes(), rest))
    for at, value in [(80, 1.5), (80, 1e-9), (88, math.nan), (88, -0.1), (96, math.inf), (96, -1.0)]:  # weights
        octets = np.float64(value).tobytes()
        with pytest.raises(ValueError, match="snapshot"):
            cache.restore(signed(head[:at], octets, head[at + 8 :], direct.tobytes(), rest))
    assert cache.snapshot() == before
