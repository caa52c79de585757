"""What an attack counts, and the watch over a process that makes many attempts."""

import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = (ROOT / "tests", *sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir()))
sys.path[:0] = [str(folder) for folder in TESTS if str(folder) not in sys.path]  # the machinery is that of the tests

OUTCOMES = ("refused", "valid", "crash", "hang", "too much memory", "lost run")
FAILURES = OUTCOMES[2:]
HANG_SECONDS = 60.0
MEMORY_BYTES = 1 << 30


def watch(
    attack: str,
    command: Callable[[int], list[str]],
    seconds: float,
    seed: int,
    environment: dict[str, str] | None = None,
) -> Counter[str]:
    """Outcomes of a process that prints a seed before each attempt, and its outcome and a word on it after. How often
    each word was said of what went well goes to standard error at the end."""
    said: Counter[str] = Counter()
    try:
        return _watch(attack, command, seconds, seed, environment, said)
    finally:
        if said:
            words = ", ".join(f"{word} {count}" for word, count in sorted(said.items()))
            print(f"{attack}, by place: {words}", file=sys.stderr)


def _watch(
    attack: str,
    command: Callable[[int], list[str]],
    seconds: float,
    seed: int,
    environment: dict[str, str] | None,
    said: Counter[str],
) -> Counter[str]:
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began, outcome = seed, ""
        with subprocess.Popen(
            command(seed), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as child:
            try:
                for line in lines_of(child, end):
                    number, outcome, what = [*line.split(" ", 2), "", ""][:3]
                    began, outcome = int(number), outcome.replace("_", " ")
                    if outcome:
                        note(attack, began, outcome, what, found)
                        if what and outcome not in FAILURES:
                            said[what] += 1
                if time.monotonic() >= end:
                    child.kill()
                    return found
                if not outcome:  # ended in the middle of an attempt, or before the first
                    note(attack, began, "crash", f"status {child.wait()}", found)
            except TimeoutError:
                child.kill()
                note(attack, began, "hang", f"{HANG_SECONDS:g} s", found)
        seed = began + 1
    return found


def lines_of(child: subprocess.Popen[bytes], end: float) -> Iterator[str]:
    """What a process prints, until it ends or the time is over; a TimeoutError where it says nothing for too long."""
    assert child.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if not selector.select(HANG_SECONDS):
                raise TimeoutError
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)


def note(attack: str, seed: int, outcome: str, what: str, found: Counter[str]) -> None:
    found[outcome] += 1
    if outcome in FAILURES:
        print(f"{attack}, seed {seed}: {outcome}: {what}", file=sys.stderr)
