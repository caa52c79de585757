import itertools
import json
import multiprocessing
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data import prepare
from pgolf.data.prepare import prepare_demo, split_documents, tokenize_files
from pgolf.data.shards import find_shards, read_shard
from pgolf.data.texts import CUT_CHARACTERS, cut_text
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import DataError, UserError


def decoded_documents(folder, split: str, tokenizer: Tokenizer) -> list[str]:
    tokens = np.concatenate([read_shard(path) for path in find_shards(folder, split)])
    assert tokens[0] == tokenizer.bos_id
    starts = [*np.flatnonzero(tokens == tokenizer.bos_id), len(tokens)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def test_the_demo(demo, tokenizer, demo_texts):
    assert demo.data_path.parts[-2:] == ("datasets", "demo_sp1024")
    assert demo.tokenizer_path.parts[-2:] == ("tokenizers", "demo_1024_bpe.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (1024, 1)
    train = decoded_documents(demo.data_path, "train", tokenizer)
    val = decoded_documents(demo.data_path, "val", tokenizer)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(document.replace("\u2581", " ") for document in demo_texts)
    assert 150_000 < sum(len(text.encode("utf-8")) for text in val) <= prepare.DEMO_VAL_BYTES

    def paragraphs(texts):
        return {part.strip() for text in texts for part in text.split("\n\n") if len(part.strip()) >= 60}

    assert not paragraphs(train) & paragraphs(val)


def test_the_demo_bytes_add_up(demo, tokenizer):
    tokens = torch.from_numpy(read_shard(demo.data_path / "demo_val_000000.bin").astype(np.int64))
    counted = int(tokenizer.byte_table().count(tokens[1:], tokens[:-1]).sum())
    prepared = json.loads((demo.data_path / "prepared.json").read_text())
    texts = decoded_documents(demo.data_path, "val", tokenizer)
    assert counted == prepared["val"]["text_bytes"] == sum(len(text.encode("utf-8")) for text in texts)


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo made of little text, with a count of how often it was made."""
    made = []

    def documents():
        made.append(1)
        return [
            f"Document {i}. " + f"It says {i * i} and more words, {i} of {i + 1} times over. " * 40 for i in range(40)
        ]

    monkeypatch.setattr(prepare, "demo_documents", documents)
    monkeypatch.setattr(prepare, "DEMO_VOCAB_SIZE", 330)
    monkeypatch.setattr(prepare, "DEMO_VAL_BYTES", 10_000)
    return made


def test_the_demo_is_reused_and_made_again_when_something_changed(tmp_path, quick_demo, monkeypatch):
    paths = prepare_demo(tmp_path)
    shard = paths.data_path / "demo_train_000000.bin"
    first = shard.read_bytes()
    prepare_demo(tmp_path)
    assert len(quick_demo) == 1
    shard.write_bytes(first[:-2])  # a file cut short
    prepare_demo(tmp_path)
    assert len(quick_demo) == 2
    assert shard.read_bytes() == first
    paths.tokenizer_path.unlink()
    prepare_demo(tmp_path)
    assert len(quick_demo) == 3
    (paths.data_path / "prepared.json").write_text('{"sha256": [1, 2, 3]}')
    prepare_demo(tmp_path)
    assert len(quick_demo) == 4
    monkeypatch.setattr(prepare.platform, "python_version", lambda: "3.99.0")
    prepare_demo(tmp_path)
    assert len(quick_demo) == 5
    assert json.loads((paths.data_path / "prepared.json").read_text())["python"].endswith("3.99.0")


def test_a_ready_demo_needs_no_writing(tmp_path, quick_demo, monkeypatch):
    paths = prepare_demo(tmp_path)
    monkeypatch.setattr(prepare, "make_folder", None)
    assert prepare_demo(tmp_path) == paths


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="cannot write to folder"):
        prepare_demo(tmp_path / "data")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_at_once_and_one_killed_midway(tmp_path, quick_demo):
    fork = multiprocessing.get_context("fork")
    made = fork.SimpleQueue()
    quick_documents = prepare.demo_documents

    def start(seconds: float):
        def documents():
            made.put(1)
            time.sleep(seconds)
            return quick_documents()

        def run():
            prepare.demo_documents = documents
            prepare_demo(tmp_path)

        process = fork.Process(target=run)
        process.start()
        return process

    killed = start(seconds=60)
    made.get()  # it holds the lock now
    waiting = [start(seconds=0.2), start(seconds=0.2)]
    time.sleep(0.3)
    assert made.empty()  # they wait
    killed.kill()
    for process in (killed, *waiting):
        process.join(timeout=60)
    assert [process.exitcode for process in waiting] == [0, 0]
    assert made.get() == 1
    assert made.empty()  # one made it, the other used it
    prepare_demo(tmp_path)
    assert not quick_demo  # and so do we
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks")
def test_who_waits_for_another_process_and_who_works_gives_signs_of_life(tmp_path, quick_demo, monkeypatch):
    signs = []
    prepare_demo(tmp_path, lambda: signs.append("works"))
    assert len(signs) >= 2
    held = prepare.locked(tmp_path / "lock")
    held.__enter__()

    def waiting():
        signs.append("waits")
        if signs.count("waits") == 2:
            held.__exit__(None, None, None)

    monkeypatch.setattr(prepare, "LOCK_SECONDS", 0.01)
    with prepare.locked(tmp_path / "lock", waiting):
        assert signs.count("waits") == 2


@settings(deadline=None)
@given(
    documents=st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=30, unique=True), room=st.integers(0, 300)
)
def test_split_documents(documents, room):
    train, val = split_documents(documents, room)
    assert train
    assert val
    assert sorted(train + val) == sorted(documents)
    assert [text for text in documents if text in set(train)] == train
    assert len(val) == 1 or sum(len(text.encode("utf-8")) for text in val) <= room


def test_the_split_does_not_depend_on_the_order():
    documents = [f"text {i}" for i in range(100)]
    assert split_documents(documents, 200)[1] == split_documents(documents[::-1], 200)[1]
    assert split_documents(documents, 200)[1] != documents[-25:]


WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "quartz",
]


def prose(seed: int, words: int = 3000) -> str:
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return " ".join(f"{word}{i}\n\n" if i % 40 == 39 else f"{word}" for i, word in enumerate(chosen))


def test_one_big_file(tmp_path):
    (tmp_path / "book.txt").write_text(prose(0, 30_000), newline="")
    paths = tokenize_files([tmp_path / "book.txt"], tmp_path / "out", vocab_size=400)
    assert paths.data_path == tmp_path / "out"
    assert sorted(path.name for path in paths.data_path.iterdir()) == [
        "out_400_bpe.model",
        "out_train_000000.bin",
        "out_val_000000.bin",
        "prepared.json",
    ]
    tokenizer = Tokenizer(paths.tokenizer_path)
    train, val = (decoded_documents(tmp_path / "out", split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(cut_text(prose(0, 30_000), CUT_CHARACTERS))
    share = sum(map(len, val)) / len(prose(0, 30_000))
    assert 0.03 < share <= 0.1
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_many_files_are_a_document_each_and_duplicates_are_dropped(tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(12)]
    for i, path in enumerate(files):
        path.write_text(prose(i % 11))
    files.append(tmp_path / "empty.txt")
    files[-1].touch()
    paths = tokenize_files(files, tmp_path / "out", vocab_size=400, val_fraction=0.3)
    prepared = json.loads((paths.data_path / "prepared.json").read_text())
    assert (prepared["train"]["documents"], prepared["val"]["documents"]) == (8, 3)
    assert prepared["duplicate_documents"] == 2  # the copy and the empty file
    assert prepared["tokenizer_sha256"] == Tokenizer(paths.tokenizer_path).sha256


def test_with_a_given_tokenizer(tmp_path, demo):
    (tmp_path / "a.txt").write_text(prose(1, 10_000))
    paths = tokenize_files([tmp_path / "a.txt"], tmp_path / "out", tokenizer=demo.tokenizer_path)
    assert paths.tokenizer_path.read_bytes() == demo.tokenizer_path.read_bytes()
    assert int(read_shard(find_shards(paths.data_path, "train")[0]).max()) < 1024


def test_shards_roll_over(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "_CHARACTERS_AT_ONCE", 500)
    documents = [prose(i, 100) for i in range(7)]
    total = prepare._write_split(tmp_path, "x_train", tokenizer, documents, shard_tokens=100)
    shards = [read_shard(path) for path in find_shards(tmp_path, "train")]
    assert [len(shard) for shard in shards[:-1]] == [100] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= 100
    expected = [token for text in documents for token in [1, *tokenizer.encode(text)]]
    assert np.concatenate(shards).tolist() == expected
    assert total == len(expected) > 300


@pytest.mark.parametrize(
    ("content", "arguments", "error", "message"),
    [
        (b"good\n\nba\xffd", {}, DataError, r"a.txt: byte 8: 0xff is not UTF-8"),
        (b"", {}, DataError, "0 bytes of text make 0 documents"),
        (b"one small document", {}, DataError, "18 bytes of text make 1 documents"),
        (b"abcd\n\n" * 5000, {"vocab_size": 4000}, DataError, "cannot fill 4000 pieces"),
        (b"abcd\n\n" * 5000, {"vocab_size": 7}, UserError, "accepted are 320 to 65536"),
        (b"abcd\n\n" * 5000, {"val_fraction": 1.0}, UserError, "between 0 and 1"),
        (b"abcd\n\n" * 5000, {"val_fraction": float("nan")}, UserError, "between 0 and 1"),
        (b"abcd\n\n" * 5000, {"tokenizer": "none.model"}, DataError, "cannot read tokenizer none.model"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing(tmp_path, content, arguments, error, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        tokenize_files([tmp_path / "a.txt"], tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_missing_files_and_used_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none.txt: No such file"):
        tokenize_files([tmp_path / "none.txt"], tmp_path / "out")
    (tmp_path / "a.txt").write_text(prose(0))
    with pytest.raises(UserError, match="not an empty folder"):
        tokenize_files([tmp_path / "a.txt"], tmp_path)


def test_what_a_killed_tokenisation_left_is_cleared_at_the_next_start(tmp_path):
    (tmp_path / "a.txt").write_text(prose(0, 10_000))
    killed, busy, foreign = (tmp_path / name for name in (".1.pgolf-making", ".2.pgolf-making", ".3.pgolf-making"))
    for folder in (killed, busy, foreign):
        folder.mkdir()
        (folder / ".text").touch()
    locks = [tmp_path / f".{number}.pgolf-making.lock" for number in (1, 2)]
    locks[0].touch()
    with prepare.locked(locks[1]):
        tokenize_files([tmp_path / "a.txt"], tmp_path / "out", vocab_size=400)
    assert {path for path in tmp_path.iterdir() if path.name.startswith(".")} == {busy, locks[1], foreign}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_refused_tokenisation_leaves_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "a.txt").write_text("too little")
    with pytest.raises(DataError, match="1 documents"):
        tokenize_files([tmp_path / "a.txt"], tmp_path / "new" / "er" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_killed_processes_left_of_the_demo_is_cleared(tmp_path, quick_demo):
    for folder in ("datasets/demo_sp330", "tokenizers"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ".demo_train_000000.bin.abc.tmp").touch()
    (tmp_path / "datasets/demo_sp330/.prepared.json.abc.tmp").touch()
    prepare_demo(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "null",
        "[]",
        '{"sha256": null}',
        '{"sha256": {"/dev/zero": "0", "demo_train_000000.bin": "0", "demo_val_000000.bin": "0"}}',
        '{"sha256": {"' + "x" * 5000 + '": "0", "\\ud800": "0", "demo_val_000000.bin": "0"}}',
    ],
)
def test_any_prepared_json_is_made_again(tmp_path, quick_demo, text):
    paths = prepare_demo(tmp_path)
    good = (paths.data_path / "prepared.json").read_text()
    damaged = json.loads(good) | json.loads(text) if text.startswith("{") else text
    (paths.data_path / "prepared.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    prepare_demo(tmp_path)
    assert len(quick_demo) == 2
    assert (paths.data_path / "prepared.json").read_text() == good
