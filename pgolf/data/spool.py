"""Documents on disk that are used like a list: what does not fit into memory can still be split and encoded."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from pgolf.runtime.files import WriteError


class Spool(Sequence[str]):
    """Different documents in the order in which they came, kept in the new file `path`.

    Of each document only its place and its hash are in memory, about 200 bytes. `WriteError` when the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], documents: Iterable[str]):
        self.dropped = 0  # that were empty, or there already
        self.sizes = array("q")  # bytes of UTF-8
        self._starts = array("q")
        seen: dict[bytes, None] = {}
        end = 0
        try:
            with open(path, "wb") as file:
                for document in documents:
                    data = document.encode("utf-8")
                    digest = hashlib.sha256(data).digest()
                    if not data or digest in seen:
                        self.dropped += 1
                        continue
                    seen[digest] = None
                    file.write(data)
                    self.sizes.append(len(data))
                    self._starts.append(end)
                    end += len(data)
        except OSError as error:
            raise WriteError(path, error) from None
        self.digests = list(seen)
        self.bytes = end
        self._file = open(path, "rb")  # noqa: SIM115  closed with the spool

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Selection": ...
    def __getitem__(self, index: int | slice) -> "str | Selection":
        if isinstance(index, slice):
            return Selection(self, range(len(self))[index])
        self._file.seek(self._starts[index])
        return self._file.read(self.sizes[index]).decode("utf-8")


class Selection(Sequence[str]):
    """Some of `documents`, looked up when they are asked for."""

    def __init__(self, documents: Sequence[str], chosen: Sequence[int]):
        self._documents, self._chosen = documents, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Selection": ...
    def __getitem__(self, index: int | slice) -> "str | Selection":
        if isinstance(index, slice):
            return Selection(self._documents, self._chosen[index])
        return self._documents[self._chosen[index]]
