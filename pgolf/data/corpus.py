"""The demo corpus: real text that every Python installation carries, so that nothing has to be downloaded.

Two sources, in a fixed order: the language reference's topics (`pydoc_data.topics`), and the docstrings of the standard
library, one document a module. Source files are parsed, never imported, and test packages are left out. A docstring or
a longer paragraph that an earlier document has is left out too, so that a validation split holds nothing that the
training split has word for word.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pgolf.errors import DataError

MIN_DOCUMENT_CHARACTERS = 200
MIN_REPEAT_CHARACTERS = 60  # shorter paragraphs, such as "Returns None.", may stand in several documents
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.stmt, ast.excepthandler)  # definitions stand in these; expressions have none


def demo_documents() -> list[str]:
    """About 550 documents, 2 MB of text; the same for the same Python version. Takes about 3 s.

    `DataError` where Python came without `pydoc_data` or without the library's source files.
    """
    documents = _without_repeats([*_topics(), *_module_documents()])
    return [document for document in documents if len(document) >= MIN_DOCUMENT_CHARACTERS]


def _without_repeats(documents: list[str]) -> Iterator[str]:
    """The documents less each paragraph of `MIN_REPEAT_CHARACTERS` or more that stood before."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            text = paragraph.strip()
            if text not in seen:
                kept.append(paragraph)
            if len(text) >= MIN_REPEAT_CHARACTERS:
                seen.add(text)
        yield "\n\n".join(kept)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"Python at {sys.prefix} has no module pydoc_data; use one with the full standard library, "
            "or your own text: pgolf data tokenize FILES"
        ) from None
    return [_utf8(topics[name]) for name in sorted(topics)]


def _module_documents() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = list(_sources(root))
    if not sources:
        raise DataError(
            f"no source files of the standard library in {root}; use a Python that has them, "
            "or your own text: pgolf data tokenize FILES"
        )
    seen: set[str] = set()
    for path in sources:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # deliberately broken files, such as lib2to3's test data
            continue
        parts = path.relative_to(root).with_suffix("").parts
        paragraphs = []
        for name, docstring in _docstrings(tree, ()):
            if docstring not in seen:
                seen.add(docstring)
                paragraphs.append(f"{name or 'module ' + '.'.join(parts)}\n\n{docstring}\n")
        if paragraphs:
            yield _utf8("\n".join(paragraphs))


def _sources(root: Path) -> Iterator[Path]:
    """Source files of the modules that belong to the standard library, by module name and then by path."""
    for name in sorted(sys.stdlib_module_names):
        if (root / f"{name}.py").is_file():
            yield root / f"{name}.py"
        for path in sorted((root / name).rglob("*.py")):
            if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
                yield path


def _docstrings(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(dotted name within the module, docstring) of `node` and what is defined in it, in the order of the source."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and (text := ast.get_docstring(node)):
        yield ".".join(names), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield from _docstrings(child, (*names, child.name))
        elif isinstance(child, _BLOCKS):
            yield from _docstrings(child, names)


def _utf8(text: str) -> str:
    """Escapes such as "\\ud800" in a docstring have no UTF-8 form; they become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
