"""Data that several test files share, made once a session."""

import pytest

from pgolf.data.prepare import DataPaths, prepare_demo
from pgolf.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> DataPaths:
    """The demo's data; tests must not change it."""
    return prepare_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo.tokenizer_path)
