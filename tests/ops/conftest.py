"""Every test of an operation draws fresh random inputs; a failing test prints the seed that PGOLF_TEST_SEED repeats."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_seed():
    seed = int(os.environ.get("PGOLF_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"PGOLF_TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture
def poisoned():
    """New memory is full of NaN and of the largest integers, so a result that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
