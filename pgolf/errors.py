"""Errors whose message is one line for a person: what was wrong, where, and what is accepted.

The command line and `train_gpt.py` print the message alone and exit with status 2. Messages quote what they were given,
so whatever prints one sends it through `one_line`.
"""

import contextlib
import importlib
import signal
import sys
from typing import Any

MOST_LETTERS = 300  # of a message
NO_MEMORY = ("OutOfMemoryError", "not enough memory", "can't allocate memory", "can't start new thread")


class PgolfError(Exception):
    """Base of every error that is reported as one line."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came, to this process or to another of the same run."""

    def __init__(self, number: int = signal.SIGTERM):
        self.status = 128 + number


class UserError(PgolfError, ValueError):
    """A setting, argument or environment variable that cannot be used."""


class DataError(PgolfError, ValueError):
    """A shard, tokenizer or text file that cannot be used; the message names the file and the offset."""


class ScoreError(PgolfError, ArithmeticError):
    """A model that has no score: the sum of its losses is not a number, or infinite."""


class QuantizeError(PgolfError, ArithmeticError):
    """Weights, or second moments of what they are multiplied with, that are not finite or too large to be stored."""


class ArtifactError(PgolfError, ValueError):
    """A `.pgolf` file that is damaged, hostile, or of a version this build does not read."""


class NotInstalledError(UserError, ImportError):
    """A part of pgolf that is not built, or built from other sources; the message names the command that mends it."""


def imported(name: str, what: str) -> Any:
    """The module `name`, imported where `what` needs it, so that all else runs without; else `NotInstalledError`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise not_installed(error.name or name, what) from None


def not_installed(name: str, what: str) -> NotInstalledError:
    """Of a module whose distribution has the same name."""
    name = name.partition(".")[0]
    return NotInstalledError(
        f"{what} needs {name}, which is not installed for {sys.executable}; run: pip install {name}"
    )


def out_of_memory(error: BaseException | None) -> str:
    """A line for an error that says so, be it Python's own or torch's, of the host or of a device; "" for any other."""
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
        return f"out of memory ({said})"
    return ""


def one_line(message: object, most: int = MOST_LETTERS) -> str:
    """`message` as a terminal may have it: one line of at most `most` letters, everything unprintable written out.

    An escape sequence becomes `\\x1b[31m`, a byte that is no UTF-8 `\\udcff`. What is too long loses its middle.
    """
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(message))
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


def complain(program: str, error: object) -> int:
    """Print one line; the status of a refusal."""
    with contextlib.suppress(OSError):
        print(one_line(f"{program}: {error}"), file=sys.stderr)
    return 2
