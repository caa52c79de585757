"""Files are written whole or not at all: write to a temporary name in the same folder, flush to disk, rename."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pgolf.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that takes the name `path` when the block ends, and vanishes if the block raises."""
    path = Path(path)
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
