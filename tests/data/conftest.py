"""Data that several test files share, made once a session."""

import pytest

from pgolf.data.corpus import demo_documents
from pgolf.data.prepare import DataPaths, prepare_demo
from pgolf.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> DataPaths:
    """The demo's data; tests must not change it."""
    return prepare_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """The demo corpus, collected a second time: the same text as `demo` was made of."""
    return demo_documents()


@pytest.fixture(scope="session")
def tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo.tokenizer_path)
