"""Fresh random numbers for every test; a failing one prints the seed that PGOLF_TEST_SEED repeats."""

import os

import numpy as np
import pytest


@pytest.fixture
def rng():
    seed = int(os.environ.get("PGOLF_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"PGOLF_TEST_SEED={seed}")
    return np.random.default_rng(seed)
