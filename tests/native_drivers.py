"""Programs of csrc/ without Python: built with other flags, or with the sanitizers, for tests and bench/studies."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "coder_driver": (*("coder", "float_coder", "int_layout", "logistic", "match_rows", "mix_coder", "static_coder"),),
    "ngram_driver": ("hint_counts", "ngram_cache", "ngram_counts"),
}
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(program: Path, driver: str, *flags: str) -> str:
    """Compile tests/`driver`.cpp and what it needs: "", or what the compiler said."""
    sources = [ROOT / "tests" / f"{driver}.cpp", *(ROOT / "csrc" / f"{source}.cpp" for source in SOURCES[driver])]
    command = [
        "g++",
        "-std=c++17",
        "-pthread",
        "-I",
        str(ROOT / "csrc"),
        *flags,
        *map(str, sources),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def build_sanitized(program: Path, driver: str, *flags: str) -> None:
    """The same with AddressSanitizer and UBSan; the test is skipped where there are none."""
    problem = build(program, driver, *SANITIZED, *flags)
    if problem:
        pytest.skip(f"g++ {' '.join(SANITIZED)}: {problem.strip()[-200:]}")
