"""Which code and which libraries a run was made with."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import pgolf

LIBRARIES = ("triton", "numpy", "sentencepiece", "brotli", "zstandard")


def versions() -> dict[str, str]:
    found = {"pgolf": pgolf.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Of the checkout that this package runs from, with "+" where files differ from it; None where there is none."""
    root = Path(pgolf.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
