"""Which versions pgolf was tried with, and what is known of others: the one place. docs/versions.md has the results."""

import re

# Oldest and newest of which docs/versions.md has a row, with what was run of the tests. pyproject.toml asks for no
# older ones, and for no newer torch and triton; `pgolf doctor` has a note for what is outside.
TRIED = {"python": ("3.10", "3.13"), "torch": ("2.9", "2.15"), "triton": ("3.5", "3.9"), "numpy": ("1.26", "2.5")}


def release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; () of what is no version."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def untried(name: str, version: str) -> str:
    """What was tried instead of a `version` that is outside, "3.10 to 3.13"; "" for one that is not, or unknown."""
    oldest, newest = TRIED[name]
    found = release(version)[:2]
    return "" if not found or release(oldest) <= found <= release(newest) else f"{oldest} to {newest}"


def interpreter_fails(triton: str, numpy: str) -> bool:
    """Whether Triton's interpreter stops with "only 0-dimensional arrays can be converted"."""
    return release(triton) < (3, 7) and release(numpy) >= (2, 4)
