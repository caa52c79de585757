"""Kinds of bad input that are shards, tokenizers, text and what a repository of data says."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.studies.attacks.bad_files import damaged
from bench.studies.attacks.bad_settings import ESCAPES, LONG, Kind
from bench.studies.attacks.calls import Call, evaluate, train
from bench.studies.attacks.small_project import DATASET, MODEL, TRAIN, VAL

SIDECAR = VAL.replace("_val_", "_val_bytes_")
AS_THEY_ARE = object()


def shard(path: str, make: Callable[[random.Random], bytes]) -> Kind:
    """Met by training, by scoring or by an inspection, which tells its problems on standard output."""

    def kind(chance: random.Random) -> Call:
        Path(path).write_bytes(make(chance))
        named = Path(path).name if path == TRAIN else "data"
        calls = [train(named), Call(("data", "inspect", "data"), named, status=(1,), silent=(1,))]
        return chance.choice(calls if path == TRAIN else [*calls, evaluate(named)])

    return kind


def header(magic: int, version: int, count: int, tokens: bytes) -> bytes:
    import numpy as np

    return np.array([magic, version, count, *[0] * 253], "<i4").tobytes() + tokens


def shard_of(count: int, value: int = 5) -> bytes:
    return header(20240520, 1, count, count * value.to_bytes(2, "little"))


def cut(path: str) -> Kind:
    return shard(path, lambda chance: Path(path).read_bytes()[: chance.choice((0, 1, 1023, 1025, -1, -2))])


def tokenizer(make: Callable[[random.Random], bytes]) -> Kind:
    def kind(chance: random.Random) -> Call:
        Path("new.model").write_bytes(make(chance))
        calls = (
            train("new.model", TOKENIZER_PATH="new.model"),
            evaluate("new.model", "--tokenizer-path", "new.model"),
            Call(("data", "inspect", "data", "--tokenizer", "new.model"), "new.model"),
            Call(("data", "tokenize", "data.txt", "--out", "new", "--tokenizer", "new.model"), "new.model"),
        )
        return chance.choice(calls)

    return kind


def damaged_tokenizer(chance: random.Random) -> bytes:
    Path("spoilt").write_bytes(Path(MODEL).read_bytes())
    damaged("spoilt", chance)
    content = Path("spoilt").read_bytes()
    Path("spoilt").unlink()
    return content


def prepared(*texts: str) -> Kind:
    """A prepared.json that says nothing: the run is scored, and what it cannot know is told."""

    def kind(chance: random.Random) -> Call:
        Path("data/prepared.json").write_text(chance.choice(texts), encoding="utf-8", errors="surrogateescape")
        return replace(evaluate("no prepared.json names the tokenizer"), status=(0,))

    return kind


def other_origin(chance: random.Random) -> Call:
    Path("data/prepared.json").write_bytes(Path("other/prepared.json").read_bytes())
    return chance.choice((train, evaluate))("made with another tokenizer")


def text(content: bytes, named: str, *options: str, name: str = "new.txt") -> Kind:
    def kind(chance: random.Random) -> Call:
        Path(name).write_bytes(content)
        return Call(("data", "tokenize", name, "--out", "new", *options), named)

    return kind


def tokenize(named: str, *options: str) -> Kind:
    return lambda chance: Call(("data", "tokenize", *options), named)


# What a repository says.


def repository(change: Callable[[dict, random.Random], Any], named: str = "manifest.json") -> Kind:
    """`change` is made to the manifest, or gives another text in its place."""

    def kind(chance: random.Random) -> Call:
        path = Path("hub/datasets/manifest.json")
        manifest = json.loads(path.read_text())
        changed = change(manifest, chance)
        path.write_text(changed if isinstance(changed, str) else json.dumps(manifest))
        return fetching(named)

    return kind


def fetching(named: str, sizes: Any = AS_THEY_ARE) -> Call:
    def before() -> None:
        from pgolf.data import download

        download.HuggingFaceHub = lambda repo_id: Folder(sizes)

    words = ("data", "download", "--train-shards", "1", "--root", "new")
    return Call(words, named, before=before, may_change=("new", "new/*"))  # what arrived is kept for the next time


class Folder:
    """A repository that is a folder, whose files but the manifest are said to be of other sizes."""

    repo_id = "somebody/something"

    def __init__(self, sizes: Any):
        self.said = sizes

    def sizes(self, paths: list[str]) -> dict[str, Any]:
        there = {path: Path("hub", path).stat().st_size for path in paths if Path("hub", path).exists()}
        return (
            there
            if self.said is AS_THEY_ARE
            else {path: size if "manifest" in path else self.said for path, size in there.items()}
        )

    def fetch(self, path: str, folder: Path) -> Path:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(Path("hub", path).read_bytes())
        return folder / path


def counts(manifest: dict, chance: random.Random) -> None:
    value = chance.choice((10**7, -1, None, 1e308, float("inf"), float("nan"), "1", True, [1], 10**30))
    manifest["datasets"][0]["stats"][chance.choice(("files_val", "files_train"))] = value


def paths(manifest: dict, chance: random.Random) -> None:
    names = ("../../x.model", "/etc/passwd", LONG, "\ud800", ESCAPES, "a\0b", "", None, 7, ["x"])
    manifest["tokenizers"][0]["path"] = chance.choice(names)


def names(manifest: dict, chance: random.Random) -> None:
    manifest[chance.choice(("datasets", "tokenizers"))][0]["name"] = chance.choice((LONG, "\ud800", ESCAPES, None, {}))


def others(manifest: dict, chance: random.Random) -> str:
    return chance.choice(
        (
            "[]",
            "null",
            "7",
            "{}",
            "",
            "[" * 100_000,
            '{"datasets":' * 100_000,
            '{"datasets": 5}',
            '{"datasets": [null]}',
        )
    )


def lying_file(chance: random.Random) -> Call:
    name = chance.choice((f"datasets/{DATASET}/fineweb_train_000000.bin", "tokenizers/sp.model"))
    damaged(Path("hub/datasets", name), chance)
    return fetching(Path(name).name)


KINDS: dict[str, Kind] = {
    "validation split cut": cut(VAL),
    "training shard cut": cut(TRAIN),
    "shard with another magic number": shard(
        VAL, lambda chance: header(chance.choice((0, 20240519, -1)), 1, 9, bytes(18))
    ),
    "shard of another version": shard(VAL, lambda chance: header(20240520, chance.choice((0, 2, -1)), 9, bytes(18))),
    "shard with a wrong count": shard(
        TRAIN, lambda chance: header(20240520, 1, chance.choice((-1, 10, 2**31 - 1)), bytes(18))
    ),
    "shard of no tokens": shard(TRAIN, lambda chance: shard_of(0)),
    "split of one token": lambda chance: (
        Path(VAL).write_bytes(shard_of(1)),
        chance.choice((train, evaluate))("at least 2"),
    )[1],
    "validation tokens out of the vocabulary": shard(VAL, lambda chance: shard_of(500, chance.choice((320, 65535)))),
    "training tokens out of the vocabulary": shard(TRAIN, lambda chance: shard_of(2000, chance.choice((320, 65535)))),
    "training shard too short": lambda chance: (
        Path(TRAIN).write_bytes(shard_of(9)),
        train("no training shard holds 33 tokens"),
    )[1],
    "documents that do not begin": lambda chance: (
        Path(TRAIN).write_bytes(shard_of(2000)),
        train("no token 1", LOADER="documents"),
    )[1],
    "sidecar cut": shard(SIDECAR, lambda chance: Path(VAL).read_bytes()[: chance.choice((0, 1, 1023, 1025, -1))]),
    "sidecar of another length": lambda chance: (
        Path(SIDECAR).write_bytes(shard_of(99)),
        chance.choice((train, evaluate))("sidecar"),
    )[1],
    "sidecar of no bytes": lambda chance: (
        Path(SIDECAR).write_bytes(shard_of((len(Path(VAL).read_bytes()) - 1024) // 2, 0)),
        chance.choice((train, evaluate))("0 bytes of text"),
    )[1],
    "tokenizer damaged": tokenizer(damaged_tokenizer),
    "tokenizer of another kind": tokenizer(
        lambda chance: chance.choice((b"", b"\0", b"{}", b"\x80\x04.", bytes(1 << 16)))
    ),
    "tokenizer of another vocabulary": lambda chance: train(
        "has 330 pieces", TOKENIZER_PATH="other/other_330_bpe.model"
    ),
    "vocabulary of another size": lambda chance: train("VOCAB_SIZE=1024", VOCAB_SIZE="1024"),
    "data of another tokenizer": other_origin,
    "prepared.json nested": prepared(
        "[" * 100_000, '{"tokenizer_sha256":' * 100_000, '{"a":' + "[" * 9000 + "]" * 9000 + "}"
    ),
    "prepared.json of another kind": prepared(
        "[]", "null", "7", "", "{}", "\udcff", '{"tokenizer_sha256": 7}', '{"tokenizer_sha256": [1]}'
    ),
    "prepared.json huge": prepared(" " * 16_000_001, '{"tokenizer_sha256": ' + "9" * 10_000 + "}"),
    "text that is not UTF-8": text(b"good\n" * 5000 + b"\xff\xfe", "is not UTF-8"),
    "text of nothing": text(b"", "0 bytes of text"),
    "text too short": text(b"a", "one to train and one to validate"),
    "text too small for its pieces": text(b"a b c d\n\n" * 9000, "pieces", "--vocab-size", "60000"),
    "JSONL that is none": lambda chance: text(
        b'{"text": "a"}\n'
        + chance.choice((b"{", b"[]", b"null", b'{"text": 7}', b'{"text": "\\ud800"}', b"[" * 100_000, b"\xff")),
        "line 2",
        name="new.jsonl",
    )(chance),
    "pieces out of range": lambda chance: tokenize(
        "pieces", "data.txt", "--out", "new", "--vocab-size", chance.choice(("0", "-1", "319", "65537", str(2**70)))
    )(chance),
    "a share out of range": lambda chance: tokenize(
        "fraction", "data.txt", "--out", "new", "--val-fraction", chance.choice(("0", "1", "nan", "inf", "-1", "1e300"))
    )(chance),
    "an output that is there": lambda chance: tokenize(
        "exists", "data.txt", "--out", chance.choice(("data", "data.txt"))
    )(chance),
    "an output that cannot be": lambda chance: tokenize(
        "", "data.txt", "--out", chance.choice(("/proc/x", "data.txt/x", LONG, "a\ud800", ""))
    )(chance),
    "text that is not there": lambda chance: tokenize(
        "", chance.choice(("nowhere", LONG, ESCAPES, "\udcff", "runs")), "--out", "new"
    )(chance),
    "repository: counts": repository(counts, "files_"),
    "repository: paths": repository(paths),
    "repository: names": repository(names),
    "repository: another manifest": repository(others),
    "repository: a manifest of 16 MB": repository(lambda manifest, chance: " " * 16_000_001),
    "repository: sizes": lambda chance: fetching("size", chance.choice((None, -1, "7", 1.5, float("inf"), [1]))),
    "repository: sizes beyond the disk": lambda chance: fetching("free", 10**18),
    "repository: other sizes than said": lambda chance: fetching("the repository says", chance.choice((0, 1, 5000))),
    "repository: damaged files": lying_file,
    "repository: more shards than there are": lambda chance: Call(
        ("data", "download", "--train-shards", chance.choice(("2", "-1", str(2**70)))),
        "training shards",
        before=fetching("").before,
    ),
}
