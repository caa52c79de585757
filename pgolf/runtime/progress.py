"""Progress on long work: a bar when a person is watching and tqdm is there, plain lines when not."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over `items`, showing how far it got on standard error."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm  # here: a run that nobody watches does without

        yield from tqdm(items, desc=description, total=total, unit=unit, leave=False)
        return
    last_line = time.monotonic()
    for count, item in enumerate(items):
        yield item
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(
                f"{description}: {count + 1}" + (f"/{total}" if total else "") + f" {unit}", file=sys.stderr, flush=True
            )
