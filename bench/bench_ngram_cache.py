"""The n-gram cache on one core over four million tokens and more, memory taken anew in every call, beside the peers'.

The stream is the English text of shared/data in 8,192 pieces, where that lies beside the repository; else the demo's
text, block by block in fresh order until there is enough of it. The base says 1 / vocabulary of every token.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.harness.measure import QUICK, Work
from bench.peers import contenders

pytest.importorskip("sentencepiece", reason="text needs a tokenizer")

from pgolf import NgramCache
from pgolf.data.prepare import prepare_demo
from pgolf.data.shards import find_shards, read_shard
from pgolf.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
LEAST = 50_000 if QUICK else 4_000_000  # tokens
BLOCK = 512


def real_text() -> tuple[np.ndarray, int, str]:
    """(tokens, vocabulary, what they are) of the books, the proposals and two more files."""
    tokenizer = Tokenizer(SHARED / "tokenizers" / "fineweb_8192_bpe.model")
    files = sorted(path for path in (SHARED / "text").rglob("*") if path.is_file())
    documents = tokenizer.encode_documents([path.read_text(encoding="utf-8") for path in files])
    return np.concatenate(documents).astype(np.uint16), tokenizer.vocab_size, "English text, 8,192 pieces"


def repeated_demo() -> tuple[np.ndarray, int, str]:
    paths = prepare_demo(ROOT / "data")
    tokens = np.concatenate([read_shard(path) for path in find_shards(paths.data_path, "train")])
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK)
    random = np.random.default_rng(0)
    parts = [random.permutation(blocks).ravel() for _ in range(-(-LEAST // blocks.size))]
    return np.concatenate(parts).astype(np.uint16), 1024, "the demo's text again and again, 1,024 pieces"


@pytest.fixture(scope="module")
def stream() -> tuple[np.ndarray, int, str]:
    found = real_text() if (SHARED / "text").is_dir() and not QUICK else repeated_demo()
    return found if not QUICK else (found[0][:LEAST], *found[1:])


def new_cache(stream, mixing: str) -> NgramCache:
    tokens, vocab_size, _ = stream
    return NgramCache(vocab_size, mixing=mixing, memory_bytes=64 * len(tokens))


def shape(stream) -> str:
    return f"{len(stream[0]) / 1e6:.2f} M tokens ({stream[2]})"


@pytest.mark.parametrize("mixing", ["adaptive", "dirichlet", "pyp"])
def test_score(measure, stream, mixing):
    tokens, vocab_size, _ = stream
    base = np.full(len(tokens), -math.log(vocab_size))
    measure(
        "NgramCache.score",
        mixing,
        shape=shape(stream),
        dtype="float64",
        backend="native, 1 thread",
        make=lambda: (tokens, base),
        call=lambda tokens, base: torch.from_numpy(new_cache(stream, mixing).score(tokens, base)),
        peers=contenders("ngram_cache", "pr_1159") if mixing == "adaptive" else {},
        tolerance=None,
        work=Work(bytes=18 * len(tokens), tokens=len(tokens)),
    )


def test_hints(measure, stream):
    tokens = stream[0]
    measure(
        "NgramCache.hints",
        "order 16",
        shape=shape(stream),
        dtype="uint16",
        backend="native, 1 thread",
        make=lambda: (tokens,),
        call=lambda tokens: torch.from_numpy(new_cache(stream, "tilt").hints(tokens)[1]),
        peers=contenders("ngram_hints", "pr_1145"),
        tolerance=None,
        work=Work(bytes=5 * len(tokens), tokens=len(tokens)),
    )
