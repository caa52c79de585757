"""`pgolf data inspect`: what a folder of shards holds, and what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf.data.prepare import prepared_facts
from pgolf.data.shards import SPLITS, find_shards, find_sidecars, read_shard
from pgolf.data.tokenizer import ByteTable, Tokenizer
from pgolf.errors import DataError
from pgolf.runtime.progress import progress

DEFAULT_BOS_ID = 1  # of the community's tokenizers; used where no tokenizer is known
_TOKENS_AT_ONCE = 4_000_000


def inspect_folder(
    folder: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Facts about the shards in `folder`, and `problems`, one line each (empty when all is well).

    `splits[name]`: shards, tokens, documents (beginning-of-document tokens), bytes, bytes_per_token, min_token,
    max_token. Without a tokenizer `bytes` is None, or what the sidecar says. `DataError` when the folder has no shards.
    """
    folder = Path(folder)
    shards = {split: find_shards(folder, split) for split in SPLITS}
    if not any(shards.values()):
        raise DataError(f"{folder}: no *_train_*.bin or *_val_*.bin shards; `pgolf data --help` tells how to get data")
    tokenizer_path = tokenizer_path or _tokenizer_of(folder)
    tokenizer = Tokenizer(tokenizer_path) if tokenizer_path else None
    problems: list[str] = []
    splits = {split: _inspect_split(paths, split, folder, tokenizer, problems) for split, paths in shards.items()}
    sidecar = _inspect_sidecars(folder, shards["val"], tokenizer, problems)
    if sidecar is not None and splits["val"]["tokens"]:
        splits["val"]["bytes"] = sidecar["bytes"]
        splits["val"]["bytes_per_token"] = sidecar["bytes"] / splits["val"]["tokens"]
    return {
        "folder": str(folder),
        "tokenizer": str(tokenizer_path) if tokenizer_path else None,
        "vocab_size": tokenizer.vocab_size if tokenizer else None,
        "splits": splits,
        "sidecar": sidecar,
        "problems": problems,
    }


def _inspect_split(
    paths: list[Path], split: str, folder: Path, tokenizer: Tokenizer | None, problems: list[str]
) -> dict[str, Any]:
    bos_id = tokenizer.bos_id if tokenizer else DEFAULT_BOS_ID
    table = tokenizer.byte_table() if tokenizer else None
    tokens = documents = text_bytes = 0
    lowest, highest = None, None
    before = bos_id
    if not paths:
        problems.append(f"{folder}: no {split} shards")
    for path in progress(paths, f"inspect {split}", unit="shard"):
        try:
            shard = read_shard(path)
        except DataError as error:
            problems.append(str(error))
            continue
        if not len(shard):
            problems.append(f"{path}: no tokens")
            continue
        if path == paths[0] and shard[0] != bos_id:
            problems.append(
                f"{path}: token 0 is {int(shard[0])}, a split begins with a document's first token {bos_id}"
            )
        low, high = int(shard.min()), int(shard.max())
        lowest, highest = min(low, low if lowest is None else lowest), max(high, highest or 0)
        tokens += len(shard)
        documents += int(np.count_nonzero(shard == bos_id))
        if tokenizer and high >= tokenizer.vocab_size:
            where = int(np.argmax(shard >= tokenizer.vocab_size))
            problems.append(
                f"{path}: token {int(shard[where])} at index {where}, the tokenizer has {tokenizer.vocab_size} pieces"
            )
            table = None
        if table:
            text_bytes += _text_bytes(shard, table, before)
        before = int(shard[-1])
    if tokens and not documents:
        problems.append(f"{folder}: no {split} document begins with token {bos_id}")
    if paths and (gap := _first_gap(paths)) is not None:
        problems.append(f"{folder}: {split} shard number {gap:06d} is missing")
    return {
        "shards": len(paths),
        "tokens": tokens,
        "documents": documents,
        "bytes": text_bytes if table else None,
        "bytes_per_token": text_bytes / tokens if table and tokens else None,
        "min_token": lowest,
        "max_token": highest,
    }


def _text_bytes(shard: np.ndarray, table: ByteTable, before: int) -> int:
    """Bytes of text in `shard`, whose first token follows the token `before`."""
    total = 0
    for start in range(0, len(shard), _TOKENS_AT_ONCE):
        targets = torch.from_numpy(shard[start : start + _TOKENS_AT_ONCE].astype(np.int64))
        previous = torch.cat((torch.tensor([before]), targets[:-1]))
        total += int(table.count(targets, previous).sum())
        before = int(targets[-1])
    return total


def _inspect_sidecars(
    folder: Path, shards: list[Path], tokenizer: Tokenizer | None, problems: list[str]
) -> dict[str, Any] | None:
    """Byte sidecars against their validation shards: pairs in name order, equal lengths, no bytes for a first token."""
    sidecars = find_sidecars(folder)
    if not sidecars:
        return None
    if len(sidecars) != len(shards):
        problems.append(f"{folder}: {len(sidecars)} byte sidecars for {len(shards)} validation shards; each needs one")
    bos_id = tokenizer.bos_id if tokenizer else DEFAULT_BOS_ID
    tokens = total = 0
    for sidecar in sidecars:
        try:
            counts = read_shard(sidecar)
        except DataError as error:
            problems.append(str(error))
            continue
        tokens += len(counts)
        total += int(counts.sum(dtype=np.int64))
        shard = sidecar.with_name(sidecar.name.replace("_val_bytes_", "_val_"))
        try:
            targets = read_shard(shard)
        except DataError as error:
            if shard not in shards:
                problems.append(f"{sidecar}: {error}")
            continue
        if len(targets) != len(counts):
            problems.append(f"{sidecar}: {len(counts)} byte counts, but {shard.name} has {len(targets)} tokens")
        elif len(wrong := np.flatnonzero((targets == bos_id) & (counts != 0))):
            first = int(wrong[0])
            problems.append(
                f"{sidecar}: {int(counts[first])} bytes at index {first}, where a document begins; 0 is right"
            )
    return {"shards": len(sidecars), "tokens": tokens, "bytes": total}


def _first_gap(paths: list[Path]) -> int | None:
    """The first number that is missing in 000000, 000001, ...; None when all are there or names have no numbers."""
    numbers = [path.stem.rpartition("_")[2] for path in paths]
    if not all(number.isdigit() for number in numbers):
        return None
    have = {int(number) for number in numbers}
    return next((number for number in range(max(have)) if number not in have), None)


def _tokenizer_of(folder: Path) -> Path | None:
    """The model that `prepared.json` names by its hash, in `folder` or in `tokenizers/` beside `datasets/`."""
    wanted = prepared_facts(folder).get("tokenizer_sha256")
    if not isinstance(wanted, str):
        return None
    nearby = [*folder.glob("*.model"), *(folder.resolve().parent.parent / "tokenizers").glob("*.model")]
    for path in sorted(nearby):
        try:
            if Tokenizer(path).sha256 == wanted:
                return path
        except DataError:
            continue
    return None
