"""The folder of a made-up run."""

import pytest


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "runs" / "one"
