"""Data that several test files share: the demo's, made once a session, and a published repository."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from published_dataset import NAME, change_manifest

from pgolf.data.corpus import demo_documents
from pgolf.data.prepare import DataPaths, prepare_demo
from pgolf.data.shards import read_shard, write_shard
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


@pytest.fixture
def plain_environment(monkeypatch):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def remote(tmp_path, demo) -> Path:
    """The files of a published repository: two training shards, one validation shard, the tokenizer."""
    folder = tmp_path / "remote" / "datasets"
    shards = folder / "datasets" / NAME
    shards.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    shutil.copyfile(demo.tokenizer_path, folder / "tokenizers" / "fineweb_1024_bpe.model")
    tokens = np.array(read_shard(demo.data_path / "demo_train_000000.bin"))
    write_shard(shards / "fineweb_train_000000.bin", tokens[:30_000])
    write_shard(shards / "fineweb_train_000001.bin", tokens[30_000:60_000])
    write_shard(shards / "fineweb_val_000000.bin", np.array(read_shard(demo.data_path / "demo_val_000000.bin")))
    change_manifest(tmp_path / "remote", lambda manifest: None)
    return tmp_path / "remote"
