"""The fuzz targets of the tests under libFuzzer, which mutates on towards code that no input has reached yet."""

import base64
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.studies.attacks.outcomes import HANG_SECONDS, note

TARGETS = ("coder", "ngram", "kernels")
# The last as g++ says it: then the tables lie where the sanitizer watches their ends.
FLAGS = (
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=all",
    "-O2",
    "-g1",
    "-w",
    "-D__SANITIZE_ADDRESS__",
)
MOST_INPUT_BYTES = 4096
MEMORY_MB = 1024  # the targets themselves refuse an allocation out of proportion to what an input declares
KINDS = {"crash": "crash", "leak": "crash", "timeout": "hang", "oom": "too much memory"}  # of libFuzzer's artifacts
SHORT_BYTES = 400  # of an artifact that is printed


def native_readers(seconds: float, seed: int) -> Counter[str] | None:
    """One target after the other, in one process at a time; None where there is no libFuzzer."""
    from fuzz_seeds import write_seeds
    from native_drivers import build

    end = time.monotonic() + seconds
    missing = why_no_fuzzer()
    if missing:
        print(f"native_readers: left out: {missing}", file=sys.stderr)
        return None
    found: Counter[str] = Counter()
    findings = Path(tempfile.mkdtemp(prefix="pgolf-findings-"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target in TARGETS:
            problem = build(folder / target, f"fuzz/{target}", *FLAGS, "-DPGOLF_LIBFUZZER", compiler="clang++")
            if problem:
                raise SystemExit(f"fuzz/{target}: {problem.strip()[-500:]}")
            (folder / f"{target}-corpus").mkdir()
            write_seeds(target, folder / f"{target}-corpus")
        for i, target in enumerate(TARGETS):
            until = time.monotonic() + (end - time.monotonic()) / (len(TARGETS) - i)
            fuzz(folder / target, folder / f"{target}-corpus", findings, until, seed, found)
    if not any(findings.iterdir()):
        findings.rmdir()
    return found


def why_no_fuzzer() -> str:
    if not shutil.which("clang++"):
        return "needs clang++ with libFuzzer (Debian: clang, libclang-rt-14-dev)"
    code = '#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const char*, size_t) { return 0; }\n'
    command = ["clang++", "-x", "c++", "-", FLAGS[0], "-o", os.devnull]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    return f"clang++ {FLAGS[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}" if done.returncode else ""


def fuzz(program: Path, corpus: Path, findings: Path, until: float, seed: int, found: Counter[str]) -> None:
    """Runs until the time is over, a new one after each that ends with a finding; the corpus stays."""
    target, counts, runs, coverage = program.name, corpus.with_suffix(".counts"), 0, "none"
    while (left := round(until - time.monotonic())) > 0:
        counts.write_bytes(bytes(16))
        prefix = findings / f"{target}-{seed}-"
        options = {"max_total_time": left, "seed": seed % (1 << 32) or 1, "max_len": MOST_INPUT_BYTES, "len_control": 0,
                   "timeout": round(HANG_SECONDS), "rss_limit_mb": MEMORY_MB, "malloc_limit_mb": MEMORY_MB // 2,
                   "print_final_stats": 1, "artifact_prefix": prefix}  # fmt: skip
        done = subprocess.run(
            [program, *(f"-{name}={value}" for name, value in options.items()), corpus],
            env={**os.environ, "PGOLF_FUZZ_COUNTS": str(counts)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        refused, valid = struct.unpack("<QQ", counts.read_bytes())
        found.update(refused=refused, valid=valid)
        units = re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr)
        runs += int(units[-1]) if units else 0
        coverage = (re.findall(r"cov: \d+ ft: \d+", done.stderr) or [coverage])[-1]
        if done.returncode:
            tell(target, seed, done.stderr, list(findings.glob(f"{prefix.name}*")), found)
        seed += 1
    edges, features = re.findall(r"\d+", coverage) or ("0", "0")
    all_edges = (re.findall(r"\((\d+) inline 8-bit counters\)", done.stderr) or ["?"])[0]
    print(f"native_readers, {target}: {runs:,} executions reached {edges} of {all_edges} edges, {features} features",
          file=sys.stderr)  # fmt: skip


def tell(target: str, seed: int, said: str, artifacts: list[Path], found: Counter[str]) -> None:
    """Counts what ended a run, by its artifact, and prints its cause and its bytes."""
    kind = artifacts[0].name.removeprefix(f"{target}-{seed}-").split("-")[0] if artifacts else ""
    causes = [
        re.search(pattern, said, re.M) for pattern in (r"^wrong: (.*)$", r"(runtime error: .*)$", r"ERROR: (.*)$")
    ]
    cause = next((match[1] for match in causes if match), "unknown")
    outcome = "too much memory" if cause.startswith("too much memory") else KINDS.get(kind, "crash")
    where = " ".join(map(str, artifacts))
    if artifacts and artifacts[0].stat().st_size <= SHORT_BYTES:
        where += f" {base64.b64encode(artifacts[0].read_bytes()).decode()}"
    note(f"native_readers, {target}", seed, outcome, f"{cause} ({where})", found)
