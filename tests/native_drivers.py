"""Programs of csrc/ without Python: built with other flags, or with the sanitizers, for tests and bench/studies."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODER = (*("coder", "float_coder", "int_layout", "logistic", "match_rows", "mix_coder", "static_coder"),)
NGRAM = ("hint_counts", "ngram_cache", "ngram_counts")
SOURCES = {
    "coder_driver": CODER,
    "ngram_driver": NGRAM,
    "fuzz/coder": CODER,
    "fuzz/ngram": NGRAM,
    "fuzz/kernels": ("cpu_features", "gptq", "gptq_refine", "pack_bits", "trellis"),
}
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def native_source(name: str) -> Path:
    """The file of csrc/ that is called `name`.cpp."""
    (found,) = (ROOT / "csrc").rglob(f"{name}.cpp")
    return found


def build(program: Path, driver: str, *flags: str, compiler: str = "g++") -> str:
    """Compile tests/`driver`.cpp and what it needs: "", or what the compiler said."""
    sources = [ROOT / "tests" / f"{driver}.cpp", *map(native_source, SOURCES[driver])]
    if driver.startswith("fuzz/"):
        sources.append(ROOT / "tests" / "fuzz" / "harness.cpp")
    command = [
        compiler,
        "-std=c++17",
        "-pthread",
        "-ffp-contract=off",  # as in CMakeLists.txt
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
