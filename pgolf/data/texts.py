"""Documents out of a user's text: files, folders, JSONL and standard input, read piece by piece.

A text file is one document, or, where there are few, is cut into several. A JSONL file has an object a line whose
`text` is a document. Nothing is held in memory but one document (of a text file that is cut: some blocks of it).
"""

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pgolf.errors import DataError, UserError
from pgolf.runtime.files import file_bytes

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
STDIN = "-"
FORMATS = ("auto", "text", "jsonl")
FEW_FILES = 10  # with fewer text files than this, each is cut into several documents
CUT_CHARACTERS = 8_000
LONGEST_LINE = 64_000_000  # bytes, of JSONL
_BLOCK_BYTES = 1 << 20


def find_texts(names: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that `names` stand for: a folder for all text files within it, in the order of their paths.

    Hidden files and folders are passed over, and links to folders are not followed.
    """
    found = []
    for name in [os.fspath(name) for name in names]:
        if name == STDIN or not os.path.isdir(name):
            found.append(name)
            continue
        within = [
            os.path.join(folder, file)
            for folder, folders, files in os.walk(name)
            for file in files
            if file.lower().endswith(TEXT_SUFFIXES + JSONL_SUFFIXES)
            and not file.startswith(".")
            and not any(part.startswith(".") for part in Path(folder).relative_to(name).parts)
        ]
        if not within:
            raise DataError(f"{name}: no text in this folder; looked for *{', *'.join(TEXT_SUFFIXES + JSONL_SUFFIXES)}")
        found += sorted(within)
    if found.count(STDIN) > 1:
        raise UserError(f"{STDIN} stands for standard input, which can be read once")
    return found


def read_documents(files: Sequence[str], text_format: str = "auto") -> Iterator[str]:
    """Every document of `files`, in order; `auto`: JSONL by the suffix, anything else and standard input is text.

    `DataError` names the file and the offset of bytes that are not UTF-8, or the line that is not as it should be.
    """
    lines = {file for file in files if _is_jsonl(file, text_format)}
    cut = len(files) - len(lines) < FEW_FILES
    for file in files:
        try:
            if file == STDIN:
                yield from _documents(sys.stdin.buffer, "standard input", file in lines, cut)
            else:
                file_bytes(file)
                with open(file, "rb") as source:
                    yield from _documents(source, file, file in lines, cut)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None


def cut_text(text: str, characters: int) -> list[str]:
    """Parts of `text` that join to it again, each `characters` to twice that long (the last one may be shorter).

    Cut after the first blank line in that range, or else line end, or else space, or else at the end of the range.
    """
    return list(_cut(iter([text]), characters))


def _is_jsonl(file: str, text_format: str) -> bool:
    return text_format == "jsonl" or (text_format == "auto" and file.lower().endswith(JSONL_SUFFIXES))


def _documents(source: BinaryIO, name: str, lines: bool, cut: bool) -> Iterator[str]:
    if lines:
        return _texts_of_lines(source, name)
    blocks = _decoded(source, name)
    return _cut(blocks, CUT_CHARACTERS) if cut else iter(["".join(blocks)])


def _decoded(source: BinaryIO, name: str) -> Iterator[str]:
    """The text of a file, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0  # bytes before the block, less those that wait in the decoder for the rest of a character
    while True:
        block = source.read(_BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, f"byte {done + error.start}", error) from None
        done += len(text.encode("utf-8"))
        yield text
        if not block:
            return


def _cut(blocks: Iterator[str], characters: int) -> Iterator[str]:
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while len(text) - start >= 2 * characters:
            end = _end_of_part(text, start, characters)
            yield text[start:end]
            start = end
    while len(text) - start > characters:
        end = _end_of_part(text, start, characters)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _end_of_part(text: str, start: int, characters: int) -> int:
    end = min(start + 2 * characters, len(text))
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, start + characters, end)
        if found >= 0:
            return found + len(separator)
    return end


def _texts_of_lines(source: BinaryIO, name: str) -> Iterator[str]:
    """The `text` of every line of JSONL; empty lines are passed over."""
    for number, line in enumerate(iter(lambda: source.readline(LONGEST_LINE + 1), b""), 1):
        place = f"{name}: line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{place}: longer than {LONGEST_LINE} bytes; JSONL has one document a line")
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, f"line {number}, byte {error.start}", error) from None
        if not decoded.strip():
            continue
        try:
            text = json.loads(decoded)["text"]
            text.encode("utf-8")
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg} at character {error.pos}); one object a line") from None
        except UnicodeEncodeError:
            raise DataError(f"{place}: its text has half of a surrogate pair, which is no character") from None
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            raise DataError(f'{place}: not an object with a text, like {{"text": "a document"}}') from None
        yield text


def _not_utf8(name: str, place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{name}: {place}: 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8 text")
