"""A user's text: files, folders, JSONL and standard input become documents, or one line says where they do not."""

import io
import itertools
import json
import os
import sys
import tracemalloc
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.data import prepare, texts
from pgolf.data.prepare import tokenize_files
from pgolf.data.spool import Selection, Spool
from pgolf.data.texts import cut_text, find_texts, read_documents
from pgolf.errors import DataError, UserError
from pgolf.runtime.files import WriteError


@given(text=st.text(alphabet="ab \n", max_size=300), size=st.integers(1, 40))
def test_cut_text_joins_again(text, size):
    parts = cut_text(text, size)
    assert "".join(parts) == text
    assert all(size <= len(part) <= 2 * size for part in parts[:-1])
    assert all(parts)


def test_cut_text_prefers_blank_lines():
    text = "one two\nthree\n\nfour five\n\nsix"
    assert cut_text(text, 9) == ["one two\nthree\n\n", "four five\n\n", "six"]
    assert cut_text("aaaa bbbb\ncccc", 4) == ["aaaa ", "bbbb\n", "cccc"]


@given(text=st.text(alphabet="aé€ \n", max_size=300), size=st.integers(1, 40), block=st.integers(1, 50))
def test_text_that_comes_in_blocks_is_cut_as_one_that_is_whole(text, size, block):
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    assert list(texts._cut(iter(blocks), size)) == cut_text(text, size)
    assert list(Selection(cut_text(text, size), range(0))) == []


@given(text=st.text(alphabet="aé€🎉", max_size=60), bad=st.integers(0, 255), block=st.integers(1, 9))
def test_bytes_that_are_not_utf8_are_found_where_they_are(text, bad, block):
    data = text.encode() + bytes([bad])
    source = io.BytesIO(data)
    blocks = types.SimpleNamespace(read=lambda size: source.read(block))
    try:
        expected = data.decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(DataError, match=rf"^x: byte {error.start}: 0x{bad:02x} is not UTF-8"):
            list(texts._decoded(blocks, "x"))
    else:
        assert "".join(texts._decoded(blocks, "x")) == expected


@pytest.fixture
def folder(tmp_path):
    """A folder of texts, with what must not be taken for one."""
    root = tmp_path / "my text"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/d.rst", ".hidden.txt", ".git/e.txt", "f.py", "g.bin"):
        (root / name).write_text(name)
    (root / "z.jsonl").write_text('{"text": "one"}\n\n{"id": 2, "text": "two\\nlines"}\n{"text": ""}')
    return root


def test_a_folder_is_its_text_files_in_the_order_of_their_paths(folder):
    found = find_texts([folder, folder / "f.py"])
    names = [name.removeprefix(f"{folder}/") for name in found]
    assert names == ["a.md", "b.txt", "sub/c.TXT", "sub/d.rst", "z.jsonl", "f.py"]
    assert list(read_documents(found)) == ["a.md", "b.txt", "sub/c.TXT", "sub/d.rst", "one", "two\nlines", "", "f.py"]
    assert [name.removeprefix(f"{folder}/") for name in find_texts([f"{folder}/sub/../b.txt"])] == ["sub/../b.txt"]
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no text in this folder; looked for \*\.txt, .*\*\.jsonl"):
        find_texts([folder.parent / "empty"])
    with pytest.raises(UserError, match="standard input, which can be read once"):
        find_texts(["-", "a.txt", "-"])


def read_stdin(monkeypatch, data: bytes, text_format: str = "auto") -> list[str]:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    return list(read_documents(["-"], text_format))


def test_standard_input_is_text_or_as_it_is_told(monkeypatch):
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    assert read_stdin(monkeypatch, lines) == [lines.decode()]
    assert read_stdin(monkeypatch, lines, "jsonl") == ["a", "b"]
    with pytest.raises(DataError, match="standard input: byte 3: 0xff is not UTF-8"):
        read_stdin(monkeypatch, b"abc\xff")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json", r"line 2: not JSON \(Expecting value at character 0\)"),
        (b'{"text": "cut', "line 2: not JSON"),
        (b'["text"]', "line 2: not an object with a text"),
        (b'"text"', "line 2: not an object with a text"),
        (b'{"content": "x"}', "line 2: not an object with a text"),
        (b'{"text": 5}', "line 2: not an object with a text"),
        (b'{"text": null}', "line 2: not an object with a text"),
        (b'{"text": "\\ud800"}', "line 2: its text has half of a surrogate pair"),
        (b'{"text": "\xff"}', "line 2, byte 10: 0xff is not UTF-8"),
        (b"[" * 100_000, "line 2: not an object with a text"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2: not an object with a text"),
        (b" " * 300, "line 2: longer than 200 bytes"),
    ],
)
def test_wrong_lines_are_refused_with_their_number(tmp_path, monkeypatch, line, message):
    if "longer" in message:
        monkeypatch.setattr(texts, "LONGEST_LINE", 200)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n" + b'{"text": "fine"}\n')
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([str(path)]))
    assert str(caught.value).startswith(f"{path}: line 2")
    assert "\n" not in str(caught.value)


def test_jsonl_becomes_shards(tmp_path):
    words = [f"Line {i} says {i * i} and {i % 7} more words of no use. " * 9 for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*words, words[0]]))
    paths = tokenize_files([path], tmp_path / "out", vocab_size=330)
    facts = json.loads((paths.data_path / "prepared.json").read_text())
    assert facts["train"]["documents"] + facts["val"]["documents"] == 60
    assert facts["duplicate_documents"] == 1
    assert sorted(path.name for path in paths.data_path.iterdir()) == [
        "out_330_bpe.model",
        "out_train_000000.bin",
        "out_val_000000.bin",
        "prepared.json",
    ]


def test_a_spool_is_the_documents_without_repeats(tmp_path):
    documents = ["Zoë 🎉", "", "b", "a\n\n", "b", "c"]
    spool = Spool(tmp_path / "x", documents)
    assert (list(spool), len(spool), spool.dropped) == (["Zoë 🎉", "b", "a\n\n", "c"], 4, 2)
    assert spool.bytes == sum(spool.sizes) == len("".join(spool).encode())
    assert spool[-1] == "c"
    assert list(spool[::2]) == ["Zoë 🎉", "a\n\n"]
    assert list(Selection(spool, [3, 1])[1:]) == ["b"]
    assert prepare.split_indices(spool.digests, spool.sizes, 2)[1] == [
        list(spool).index(text) for text in prepare.split_documents(list(spool), 2)[1]
    ]
    spool.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with pytest.raises(WriteError, match="/dev/full: cannot be written"):
        Spool("/dev/full", ["x"])


def test_memory_does_not_grow_with_the_text(tmp_path):
    line = b"Some words that are read again and again, as a stream.\n" * 20_000  # a megabyte

    class Stream:
        left = 24

        def read(self, size: int) -> bytes:
            self.left -= 1
            return str(self.left).encode() + line if self.left >= 0 else b""

    tracemalloc.start()
    documents = Spool(tmp_path / "x", texts._cut(texts._decoded(Stream(), "x"), texts.CUT_CHARACTERS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(line) < documents.bytes + documents.dropped * texts.CUT_CHARACTERS
    documents.close()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"cannot read .*pipe.txt: not an ordinary file"):
        list(itertools.islice(read_documents([str(tmp_path / "pipe.txt")]), 1))
    with pytest.raises(DataError, match=r"cannot read .*none.txt: No such file"):
        list(read_documents([str(tmp_path / "none.txt")]))
