"""Files are written whole or not at all: write to a temporary name in the same folder, flush to disk, rename. Logs grow
by whole lines. What is read may be anybody's: only ordinary files of a bounded size are, so that no pipe is waited for.
"""

import contextlib
import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pgolf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nobody is locked out
    fcntl = None  # type: ignore[assignment]

JSON_BYTES = 16_000_000  # of a file of facts, at most


class WriteError(UserError):
    """A file that could not be written; what was under its name before is still there."""

    def __init__(self, path: str | os.PathLike[str], error: OSError):
        self.path, self.reason = Path(path), error.strerror or "input/output error"
        super().__init__(f"{path}: cannot be written ({self.reason})")


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], mode: str = "wb", old_becomes: str | os.PathLike[str] | None = None
) -> Iterator[IO[Any]]:
    """Open a temporary file that takes the name `path` when the block ends, and vanishes if the block raises.

    The file that was there before is kept as `old_becomes`, where that is given. `WriteError` when the disk is full.
    """
    path = Path(path)
    try:
        with _replacing(path, mode, old_becomes) as file:
            yield file
    except OSError as error:
        other = error.filename
        if isinstance(other, str) and not Path(other).absolute().is_relative_to(path.parent.absolute()):
            raise  # of a file elsewhere that the block opened
        raise WriteError(path, error) from error


@contextlib.contextmanager
def _replacing(path: Path, mode: str, old_becomes: str | os.PathLike[str] | None) -> Iterator[IO[Any]]:
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; the result should be an ordinary one
        if old_becomes is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, old_becomes)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused: other readers of JSON do not know them."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return value


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create `path` with its parents and check that files can be made there; a `UserError` names it otherwise."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder {path}: {error.strerror}; name one that is writable") from None
    return path


class Lines:
    """A text file that grows by whole lines: of one that no longer fits on the disk nothing is left."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise WriteError(path, error) from error

    def add(self, line: str) -> None:
        """`WriteError` when that is not possible."""
        rest = memoryview((line + "\n").encode("utf-8", "replace"))
        before = os.fstat(self.file.fileno()).st_size
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(before)
            raise WriteError(self.path, error) from error

    def lock(self) -> bool:
        """Whether this process is now the only one that holds the file's lock, which ends when the process does.

        False too if the file has lost its name since it was opened.
        """
        if fcntl is None:
            return True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        return False

    def close(self) -> None:
        self.file.close()


def missing_folders(path: str | os.PathLike[str]) -> list[Path]:
    """`path` and its parents that are not there, the innermost first."""
    return [folder for folder in (Path(path), *Path(path).parents) if not os.path.lexists(folder)]


@contextlib.contextmanager
def making_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`make_folder`; if the block raises, folders that it made are removed again, unless something is in them."""
    path = Path(path)
    new = missing_folders(path)
    try:
        yield make_folder(path)
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def file_bytes(path: str | os.PathLike[str], most_bytes: int | None = None) -> int:
    """Size of an ordinary file. OSError, with a `strerror`, for anything else and for more than `most_bytes`."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a name that no file can have: a zero byte, half of a surrogate pair
        raise OSError(errno.EINVAL, f"not a file's name ({error})") from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes long; at most {most_bytes} are read")
    return status.st_size


def read_file(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """The whole of an ordinary file of at most `most_bytes`; OSError otherwise."""
    size = file_bytes(path, most_bytes)
    with open(path, "rb") as file:
        return file.read(size)


def read_json(path: str | os.PathLike[str], most_bytes: int = JSON_BYTES) -> Any:
    """What a JSON file says. OSError where it cannot be read, ValueError where it is not JSON of a sane depth."""
    try:
        return json.loads(read_file(path, most_bytes).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
