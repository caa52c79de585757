"""The data of one run: training shards, the validation split, and the bytes of text behind each of its tokens."""

import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf.data.documents import DocumentLoader
from pgolf.data.loader import TokenLoader
from pgolf.data.prefetch import Loader, Prefetcher
from pgolf.data.prepare import prepare_demo, prepared_facts
from pgolf.data.shards import find_shards, find_sidecars, read_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import DataError, imported
from pgolf.presets import DEMO_DATA_PATH, DEMO_TOKENIZER_PATH, how_to_get
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings

COMPRESSOR_TOKENS = 8_000_000  # what xz and brotli are given at most; enough for both to settle


@dataclass(frozen=True)
class Dataset:
    tokenizer: Tokenizer
    train_shards: list[Path]
    val_tokens: Tensor  # (count,) int32
    val_token_bytes: Tensor  # (count,) int64; bytes of text of each token, given the one before it


def open_dataset(settings: Settings, ranks: Ranks) -> Dataset:
    """Find and check everything; the demo's data are made on first use, by the first rank while the others wait."""
    if (settings.data_path, settings.tokenizer_path) == (DEMO_DATA_PATH, DEMO_TOKENIZER_PATH):
        if ranks.first:
            prepare_demo("data", ranks.alive)
            ranks.alive(done=True)
        else:
            ranks.wait_for_first()
        if not Path(DEMO_TOKENIZER_PATH).exists():  # on another machine
            prepare_demo("data")
    train_shards = shards_of(settings.data_path, "train")
    tokenizer = Tokenizer(settings.tokenizer_path)
    if tokenizer.vocab_size != settings.vocab_size:
        raise DataError(
            f"VOCAB_SIZE={settings.vocab_size} but {settings.tokenizer_path} has {tokenizer.vocab_size} pieces; "
            f"set VOCAB_SIZE={tokenizer.vocab_size} or name another TOKENIZER_PATH"
        )
    check_origin(settings.data_path, tokenizer)
    val_tokens, val_token_bytes = validation_split(settings.data_path, tokenizer)
    return Dataset(tokenizer, train_shards, val_tokens, val_token_bytes)


def training_loader(settings: Settings, shards: list[Path], ranks: Ranks) -> Prefetcher:
    """Batches for this rank, as LOADER says, made ready ahead of their use."""
    order = (settings.train_batch_tokens, settings.seed, ranks.rank, ranks.world_size)
    if settings.loader == "documents":
        loader: Loader = DocumentLoader(shards, settings.bos_id, *order, vocab_size=settings.vocab_size)
    else:
        length, vocab_size = settings.train_seq_len, settings.vocab_size
        loader = TokenLoader(shards, length, *order, vocab_size=vocab_size, order=settings.loader)
    return Prefetcher(loader, ranks.device)


def check_origin(data_path: str, tokenizer: Tokenizer) -> bool:
    """`DataError` where the shards were made with another tokenizer; False where that cannot be known, because only
    those that were made or fetched by `pgolf data` remember theirs."""
    made_with = prepared_facts(data_path).get("tokenizer_sha256")
    if isinstance(made_with, str) and made_with != tokenizer.sha256:
        raise DataError(f"DATA_PATH={data_path} was made with another tokenizer than {tokenizer.path}; name its own")
    return made_with == tokenizer.sha256


def shards_of(data_path: str, split: str) -> list[Path]:
    if not os.path.isdir(data_path):
        raise DataError(f"DATA_PATH={data_path}: no such folder; {how_to_get(data_path)}")
    shards = find_shards(data_path, split)
    if not shards:
        raise DataError(f"DATA_PATH={data_path}: no *_{split}_*.bin shards; {how_to_get(data_path)}")
    return shards


def validation_split(data_path: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """All validation tokens in order, and the bytes of each: from the byte sidecar where there is one."""
    tokens = torch.from_numpy(
        np.concatenate([read_shard(shard) for shard in shards_of(data_path, "val")]).astype(np.int32)
    )
    if len(tokens) < 2:
        raise DataError(
            f"{data_path}: the validation split has {len(tokens)} tokens; at least 2 are needed to score one"
        )
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"{data_path}: the validation split has token {int(tokens.max())}, but {tokenizer.path} has only "
            f"{tokenizer.vocab_size} pieces; they do not belong together"
        )
    sidecars = find_sidecars(data_path)
    if sidecars:
        counts = torch.from_numpy(np.concatenate([read_shard(sidecar) for sidecar in sidecars]).astype(np.int64))
        if len(counts) != len(tokens):
            raise DataError(
                f"{data_path}: the byte sidecar counts {len(counts)} tokens, the validation split {len(tokens)}"
            )
    else:
        counts = tokenizer.byte_table().count(tokens[1:].long(), tokens[:-1].long())
        counts = torch.cat((torch.zeros(1, dtype=torch.int64), counts))
    if not counts[1:].any():
        source = f"by its byte sidecar {sidecars[0].name}" if sidecars else "every token is a control piece"
        raise DataError(f"{data_path}: the validation split stands for 0 bytes of text ({source}); none can be scored")
    return tokens, counts


def compressors_bpb(dataset: Dataset, alive: Callable[[], Any] = lambda: None) -> dict[str, float]:
    """Bits per byte that general compressors need for the same validation text (its first part, where it is long).
    `alive` is called between them."""
    tokens = dataset.val_tokens[:COMPRESSOR_TOKENS]
    text = dataset.tokenizer.decode(tokens.tolist()).encode()
    if not text:  # control pieces, for which a byte sidecar counts bytes
        return {}
    part = "" if len(tokens) == len(dataset.val_tokens) else f" (first {len(text)} bytes)"
    sizes = {"xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    alive()
    brotli = imported("brotli", "the comparison with brotli")
    sizes["brotli -11"] = len(brotli.compress(text, quality=11, lgwin=24))
    return {name + part: 8 * size / len(text) for name, size in sizes.items()}
