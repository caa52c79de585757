"""tests/fuzz: the fuzz targets on good inputs, on what a fuzzer has found, and on changed ones, under the sanitizers.

`python -m bench.studies.attack --only native_readers` runs them under libFuzzer.
"""

import os
import random
import subprocess

import pytest
from fuzz_seeds import beyond_32_bits, numbers, write_seeds
from native_drivers import build_sanitized, needs_compiler

SEED = int(os.environ.get("PGOLF_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
MUTATIONS = {"coder": 60, "ngram": 60, "kernels": 30}


# What was found, and whether it is valid since
FOUND = {
    # strips were laid out from a null pointer where a head was read
    "bank": ("coder", b"\0\1\0\0\1\3\2\x20\x20\xff\1\0", False),
    # zeros, of a plane of 3 to 8
    "bounds": ("coder", b"\1" + numbers(0, 0, 0, 0, 1) + b"\3\x08" + b"\xff" * 4, False),
    # a leaf got the low 32 bits of a position that is not on record: read 200 kB beyond the record
    "position": ("ngram", beyond_32_bits(), True),
}


@needs_compiler
@pytest.mark.parametrize("target", MUTATIONS)
def test_fuzz_targets_under_the_sanitizers(tmp_path, target):
    program = tmp_path / "target"
    build_sanitized(program, f"fuzz/{target}", "-O0", "-w")

    def run(mutations: int, *paths) -> tuple[int, int]:
        command = [str(program), str(SEED), str(mutations), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"seed {SEED}: {done.stderr[:2000]}"
        refused, valid, longest = done.stdout.split()
        assert float(longest) < 2
        return int(refused), int(valid)

    seeds = write_seeds(target, tmp_path)
    assert run(0, *seeds) == (0, len(seeds))
    for name, (its_target, data, valid) in FOUND.items():
        (tmp_path / name).write_bytes(data)
        if its_target == target:
            assert run(0, tmp_path / name) == (int(not valid), int(valid)), name
    refused, valid = run(MUTATIONS[target], *seeds)
    assert valid > len(seeds)
    assert refused > 0
