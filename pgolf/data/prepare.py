"""From text to a tokenizer and shards: the demo's data, or a user's own files.

Documents, not tokens, are split between training and validation, and the tokenizer is trained on the training documents
alone. Each document begins with the tokenizer's beginning-of-document token, as in the community's shards. A document
that stands twice is kept once, so no whole document is in both splits (the demo corpus also has no longer
paragraph twice, see corpus.py).
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import sentencepiece

from pgolf.data.corpus import demo_documents
from pgolf.data.shards import TOKENS_PER_SHARD, write_shard
from pgolf.data.spool import Selection, Spool
from pgolf.data.texts import find_texts, read_documents
from pgolf.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, train_tokenizer
from pgolf.errors import DataError, UserError
from pgolf.presets import DEMO_VOCAB_SIZE
from pgolf.runtime.files import make_folder, making_folder, read_file, read_json, write_json
from pgolf.runtime.progress import progress

DEMO_VAL_BYTES = 160_000
_DEMO_SHARDS = ("demo_train_000000.bin", "demo_val_000000.bin")
_DEMO_FILE_BYTES = 100_000_000  # at most; a few million are right
_CHARACTERS_AT_ONCE = 10_000_000  # encoded before they are joined: a Python list of ids takes some space
_MAKING = ".pgolf-making"
LOCK_SECONDS = 0.1  # between two looks at a lock that another process has
_RECIPE = 1  # raised when the same text would make other files than before


@dataclass(frozen=True)
class DataPaths:
    """Where a run finds its data."""

    data_path: Path  # folder of *_train_*.bin and *_val_*.bin
    tokenizer_path: Path  # SentencePiece model


def prepare_demo(root: str | os.PathLike[str] = "data", alive: Callable[[], Any] = lambda: None) -> DataPaths:
    """The demo's shards and tokenizer under `root`: made on first use (some seconds), afterwards checked and reused.

    They are made again when Python, SentencePiece or a file has changed. Several processes may call this at once: one
    makes the files, the others wait. A process that is killed leaves nothing that the next one would take for
    finished, because `prepared.json`, with the hash of every file, is written last. `alive` is called now and then.
    """
    root = Path(root)
    folder = root / "datasets" / f"demo_sp{DEMO_VOCAB_SIZE}"
    paths = DataPaths(folder, root / "tokenizers" / f"demo_{DEMO_VOCAB_SIZE}_bpe.model")
    if not _demo_is_ready(paths):
        make_folder(paths.tokenizer_path.parent)
        make_folder(folder)
        with locked(folder / ".lock", alive):
            if not _demo_is_ready(paths):
                _make_demo(paths, alive)
    return paths


def tokenize_files(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    vocab_size: int = DEMO_VOCAB_SIZE,
    tokenizer: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    text_format: str = "auto",
) -> DataPaths:
    """Make shards of a user's text in the new folder `out`, with a tokenizer trained on it or a given model.

    `files` are UTF-8 text, JSONL, folders of such files, or "-" for standard input (pgolf/data/texts.py). Fewer than 10
    text files are cut into documents of about 8,000 characters at blank lines (or line ends, or spaces, where there are
    none), so that there is something to validate on. The folder appears whole or not at all:
    `<name>_train_000000.bin` and on, `<name>_val_000000.bin`, the tokenizer, and `prepared.json`. The text is copied to
    disk on the way, beside `out`; memory holds 64 MB of it at most, to train the tokenizer.
    """
    given, out = Path(out), Path(out).absolute()
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"validation fraction {val_fraction}; accepted is a number between 0 and 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{given} exists and is not an empty folder; name a new one")
    if tokenizer is not None:
        _check_tokenizer(Tokenizer(tokenizer))
    found = find_texts(files)
    with making_folder(out.parent), _beside(out) as making:
        text = making / ".text"
        with contextlib.closing(Spool(text, read_documents(found, text_format))) as documents:
            if len(documents) < 2:
                raise DataError(
                    f"{documents.bytes} bytes of text make {len(documents)} documents; "
                    "one to train and one to validate are needed"
                )
            chosen = split_indices(documents.digests, documents.sizes, int(documents.bytes * val_fraction))
            train, val = (Selection(documents, part) for part in chosen)
            if tokenizer is None:
                model = train_tokenizer(train, vocab_size, making / f"{out.name}_{vocab_size}_bpe.model")
            else:
                model = Tokenizer(shutil.copyfile(tokenizer, making / Path(tokenizer).name))
            facts = _write_splits(making, out.name, model, train, val)
            write_json(making / "prepared.json", facts | {"duplicate_documents": documents.dropped})
        text.unlink()
    return DataPaths(given, given / model.path.name)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` when the block ends, and vanishes if the block raises.

    A lock beside it tells it from those that killed processes left behind, which are cleared.
    """
    for lock in out.parent.glob(f".*{_MAKING}.lock"):
        if _is_left(lock):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    making = out.parent / f".{secrets.token_hex(8)}{_MAKING}"
    lock = making.with_name(f"{making.name}.lock")
    try:
        with locked(lock):
            making.mkdir()
            yield making
            try:
                os.replace(making, out)
            except OSError:
                raise UserError(f"{out} was made by somebody else meanwhile; name a new folder") from None
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    finally:
        lock.unlink(missing_ok=True)


def split_documents(documents: Sequence[str], val_bytes: int) -> tuple[list[str], list[str]]:
    """(train, val) as `split_indices` chooses them."""
    encoded = [document.encode("utf-8") for document in documents]
    digests = [hashlib.sha256(data).digest() for data in encoded]
    train, val = split_indices(digests, [len(data) for data in encoded], val_bytes)
    return [documents[i] for i in train], [documents[i] for i in val]


def split_indices(digests: Sequence[bytes], sizes: Sequence[int], val_bytes: int) -> tuple[list[int], list[int]]:
    """(train, val): in the order of their hashes, documents go to validation while they fit into `val_bytes` of UTF-8.

    At least one document goes to each side (there must be two or more). Training documents keep their order.
    """
    order = sorted(range(len(digests)), key=lambda i: digests[i])
    chosen: list[int] = []
    room = val_bytes
    for index in order:
        if sizes[index] <= room and len(chosen) < len(digests) - 1:
            chosen.append(index)
            room -= sizes[index]
    if not chosen:
        chosen = [min(order, key=lambda i: sizes[i])]
    taken = set(chosen)
    return [i for i in range(len(digests)) if i not in taken], chosen


def _demo_identity() -> dict[str, Any]:
    """What the demo's files depend on."""
    return {
        "recipe": _RECIPE,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sentencepiece": sentencepiece.__version__,
        "vocab_size": DEMO_VOCAB_SIZE,
        "val_bytes_at_most": DEMO_VAL_BYTES,
    }


def prepared_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `prepared.json` in a folder of shards says; nothing where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        facts = read_json(Path(folder) / "prepared.json")
        return facts if isinstance(facts, dict) else {}
    return {}


def _demo_is_ready(paths: DataPaths) -> bool:
    prepared = prepared_facts(paths.data_path)
    try:
        hashes = prepared["sha256"]
        return (
            all(prepared[name] == value for name, value in _demo_identity().items())
            and set(hashes) == {paths.tokenizer_path.name, *_DEMO_SHARDS}
            and hashes == _hashes(paths.data_path, paths.tokenizer_path, hashes)
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _make_demo(paths: DataPaths, alive: Callable[[], Any]) -> None:
    for folder in (paths.data_path, paths.tokenizer_path.parent):  # what killed processes left
        for left in (*folder.glob(".demo_*.tmp"), *folder.glob(".prepared.json.*.tmp")):
            left.unlink(missing_ok=True)
    print("demo data: collecting the standard library's documentation", file=sys.stderr, flush=True)
    (paths.data_path / "prepared.json").unlink(missing_ok=True)
    train, val = split_documents(demo_documents(), DEMO_VAL_BYTES)
    alive()
    tokenizer = train_tokenizer(train, DEMO_VOCAB_SIZE, paths.tokenizer_path)
    alive()
    facts = _write_splits(paths.data_path, "demo", tokenizer, train, val)
    hashes = _hashes(paths.data_path, paths.tokenizer_path, [paths.tokenizer_path.name, *_DEMO_SHARDS])
    write_json(paths.data_path / "prepared.json", _demo_identity() | facts | {"sha256": hashes})


def _hashes(folder: Path, tokenizer_path: Path, names: Sequence[str] | dict[str, str]) -> dict[str, str]:
    files = {name: tokenizer_path if name == tokenizer_path.name else folder / name for name in names}
    return {name: hashlib.sha256(read_file(path, _DEMO_FILE_BYTES)).hexdigest() for name, path in files.items()}


def _write_splits(
    folder: Path, name: str, tokenizer: Tokenizer, train: Sequence[str], val: Sequence[str]
) -> dict[str, Any]:
    """Write the shards of both splits; returns the counts that `prepared.json` records."""
    facts: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    for split, documents in (("train", train), ("val", val)):
        facts[split] = {
            "documents": len(documents),
            "text_bytes": sum(map(_bytes, documents)),
            "tokens": _write_split(folder, f"{name}_{split}", tokenizer, documents),
        }
    return facts


def _write_split(
    folder: Path, prefix: str, tokenizer: Tokenizer, documents: Sequence[str], shard_tokens: int = TOKENS_PER_SHARD
) -> int:
    """Write `documents` as `<prefix>_000000.bin` and on, `shard_tokens` tokens a shard; returns the tokens."""
    pending = np.zeros(0, dtype=np.uint16)
    shards = 0
    for tokens in _encoded(tokenizer, documents, prefix):
        pending = np.concatenate((pending, tokens))
        while len(pending) >= shard_tokens:
            write_shard(folder / f"{prefix}_{shards:06d}.bin", pending[:shard_tokens])
            pending = pending[shard_tokens:]
            shards += 1
    if len(pending):
        write_shard(folder / f"{prefix}_{shards:06d}.bin", pending)
    return shards * shard_tokens + len(pending)


def _encoded(tokenizer: Tokenizer, documents: Sequence[str], description: str) -> Iterator[np.ndarray]:
    """Tokens of some documents at a time, uint16, each document after the beginning-of-document token."""
    pieces: list[list[int]] = []
    characters = 0
    for document in progress(documents, description, unit="document"):
        pieces.append([tokenizer.bos_id, *tokenizer.encode(document)])
        characters += len(document)
        if characters > _CHARACTERS_AT_ONCE:
            yield np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])
            pieces, characters = [], 0
    if pieces:
        yield np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id < 0:
        raise DataError(f"{tokenizer.path}: the model has no beginning-of-document piece (bos_id), which shards need")
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise DataError(f"{tokenizer.path}: {tokenizer.vocab_size} pieces; shards hold at most {MAX_VOCAB_SIZE}")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8"))


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system drops it when the process ends, however it ends. While
    another process has it, `waiting` is called now and then.

    Where the system or the file system has no such locks the block runs without: files are still replaced whole, so
    that only work is lost.
    """
    with open(path, "w") as file:
        while not _lock(file):
            waiting()
            time.sleep(LOCK_SECONDS)
        yield


def _lock(file: IO[str]) -> bool:
    """False while another process has the lock."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _is_left(lock: Path) -> bool:
    """Whether nobody holds the lock that a process took there; False where that cannot be known."""
    try:
        import fcntl

        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
