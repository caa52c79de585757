import sys
import types

import pytest

from pgolf.data import corpus
from pgolf.errors import DataError


def test_size_and_kind(demo_texts):
    assert 300 < len(demo_texts) < 1500
    assert 1_500_000 < sum(len(document.encode("utf-8")) for document in demo_texts) < 5_000_000
    assert min(map(len, demo_texts)) >= corpus.MIN_DOCUMENT_CHARACTERS
    text = "\n".join(demo_texts)
    assert 'The "try" statement' in text  # the language reference
    assert "module json.decoder" in text  # docstrings


def test_no_long_paragraph_stands_in_two_places(demo_texts):
    paragraphs = [part.strip() for document in demo_texts for part in document.split("\n\n")]
    long = [part for part in paragraphs if len(part) >= corpus.MIN_REPEAT_CHARACTERS]
    assert len(long) == len(set(long)) > 1000


def test_no_module_is_imported_and_tests_are_left_out(demo_texts):
    assert "antigravity" not in sys.modules  # importing it opens a web browser
    assert not any(document.startswith("module test.") for document in demo_texts)
    assert not any(".idle_test." in document.split("\n", 1)[0] for document in demo_texts)


def _library(tmp_path, monkeypatch, **sources: str) -> None:
    """A standard library of our own: `name` -> source."""
    for name, source in sources.items():
        path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))


def test_what_becomes_of_a_module(tmp_path, monkeypatch):
    long = "An explanation that goes on for rather more than sixty characters, as they do."
    method = '    def f(self):\n      """F\\ud800."""\n'
    _library(
        tmp_path,
        monkeypatch,
        json__decoder=f'"""Title."""\nclass A:\n  """{long}"""\n  if 1:\n{method}raise SystemExit',
        json__tests__x='"""Never."""',
        this=f'def g():\n  "{long}"\ndef h(): "H."',
        abc="def (",
        mine='"""Not of the library."""',
    )
    assert list(corpus._module_documents()) == [
        f"module json.decoder\n\nTitle.\n\nA\n\n{long}\n\nA.f\n\nF?.\n",
        "h\n\nH.\n",
    ]


def test_repeats_are_dropped():
    long = "x" * corpus.MIN_REPEAT_CHARACTERS
    assert list(corpus._without_repeats([f"a\n\n{long}\n\nb", f"a\n\n{long}\n\nc"])) == [f"a\n\n{long}\n\nb", "a\n\nc"]


def test_a_python_without_its_library(tmp_path, monkeypatch):
    _library(tmp_path, monkeypatch)
    with pytest.raises(DataError, match="no source files of the standard library"):
        corpus.demo_documents()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="no module pydoc_data"):
        corpus.demo_documents()


def test_topics_come_in_name_order(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics={"b": "B", "a": "A"}))
    assert corpus._topics() == ["A", "B"]
