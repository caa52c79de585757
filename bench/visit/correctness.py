"""The GPU tests, each a fact, in several processes: `exact` those against float64, `rest` all others.

    python -m bench.visit.correctness exact|rest [--quick]

A test that leaves the device unusable ends its process, which a new one follows with the tests that are left. Without a
GPU tests that need none stand in, so that `--quick` proves the way there and back.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.visit import facts
from bench.visit.plan import has_cuda
from bench.visit.turns import SOCKET, turn

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 8
POISONED = 86  # exit status: the device of this process is of no more use
MARKED = ("tests", "-m", "gpu")
WITHOUT_A_GPU = ("tests/ops/test_xsa_gate.py", "tests/ops/test_softcapped_cross_entropy.py")
FIRST = "against_float64"
FINISHED = "PGOLF_FINISHED"  # environment of a worker: the file that lists the tests that are over


# As a plugin of pytest: `-p bench.visit.correctness`


def pytest_runtest_logfinish(nodeid: str) -> None:
    with open(os.environ[FINISHED], "a", encoding="utf-8") as file:
        file.write(f"{nodeid}\n")


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = ""
        if report.longrepr is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(crash.message if crash else report.longrepr).strip().splitlines()
            why = (lines or [""])[-1 if report.skipped else 0][:300]
        facts.add(report.nodeid, outcome=report.outcome, when=report.when, seconds=report.duration, why=why)


def pytest_runtest_teardown(item, nextitem) -> None:
    if nextitem is not None and has_cuda():
        import pytest
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is of no more use: {str(error).splitlines()[0]}", returncode=POISONED)


# The part


def collect(group: str, quick: bool) -> list[str]:
    """Names of tests, the longest-running kinds first as pytest lists them."""
    where = MARKED if has_cuda() else WITHOUT_A_GPU
    select = f"{FIRST}" if group == "exact" else f"not {FIRST}"
    command = [sys.executable, "-m", "pytest", *where, "-k", select, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=_alone(), capture_output=True, text=True, timeout=120)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if not names:
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        raise SystemExit(f"no tests were found: {lines[-1]}")
    return names[:: max(1, len(names) // 6)] if quick else names


def run(names: list[str]) -> int:
    """In processes one after the other, until each test has had its turn. The last status that was not 0."""
    worst = 0
    while names:
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as finished:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.visit.correctness", "-p", "no:cacheprovider"]
            environ = {**_alone(), FINISHED: finished.name}
            status = subprocess.run([*command, "-o", "addopts=", *names], cwd=ROOT, env=environ).returncode
            done = set(finished.read().splitlines())
        worst = status or worst
        left = [name for name in names if name not in done]
        if left == names:  # it died before its first test was over: that test is to blame
            facts.add(names[0], outcome="died", when="call", seconds=0.0, why=f"its process ended with status {status}")
            left = names[1:]
        names = left if status not in (0, 1) else []
    return worst


def _alone() -> dict[str, str]:
    """The environment of a worker: the turn is this part's, not its."""
    return {name: value for name, value in os.environ.items() if name not in (SOCKET, "PGOLF_BENCH_QUICK")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The GPU tests, each a fact.")
    parser.add_argument("group", choices=("exact", "rest"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    names = collect(options.group, options.quick)
    facts.add(f"tests {options.group}", count=len(names))
    workers = 2 if options.quick else WORKERS
    with turn(), ThreadPoolExecutor(workers) as pool:
        statuses = list(pool.map(run, filter(None, (names[start::workers] for start in range(workers)))))
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
