"""`pytest bench/`: benchmarks, not tests. They pass at any speed and take what time they need.

Stopped early (Ctrl-C or SIGTERM), it keeps what was measured until then. As a part of a visit (bench/gpu.sh) it keeps
each row as a fact at once, and measures no ceilings: another part does.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.harness import device, results
from bench.harness.measure import CLOCK, QUICK, Call, Work, able, check_agreement, run_rounds, seconds_per_call
from bench.visit import facts

ROWS = pytest.StashKey[list[dict[str, Any]]]()
MACHINE = pytest.StashKey[dict[str, Any]]()
NEIGHBOURS = pytest.StashKey[device.Neighbours]()
BUSY = 0.05  # share of the CPUs taken by others from which figures are doubtful


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[MACHINE] = {**device.describe(), "date": device.today()}
    config.stash[NEIGHBOURS] = device.Neighbours()
    config.option.benchmark_quiet = True  # the table below says more
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def kind(pytestconfig: pytest.Config) -> str:
    """The device that is measured: "cuda" where there is one, else "cpu"."""
    return pytestconfig.stash[MACHINE]["kind"]


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config, kind: str):
    """Measured before the first benchmark and after the last; the higher counts, as neighbours only take away."""
    if facts.FOLDER in os.environ:
        yield
        return
    first = device.measure_ceilings(seconds_per_call(kind), kind, QUICK)
    pytestconfig.stash[MACHINE] |= {"ceilings": first, "others_share": None}  # what counts if this run is interrupted
    yield
    last = device.measure_ceilings(seconds_per_call(kind), kind, QUICK)
    pytestconfig.stash[MACHINE] |= {
        "ceilings": {name: max(value, last[name]) for name, value in first.items()},
        "others_share": pytestconfig.stash[NEIGHBOURS].share(),
    }


@pytest.fixture
def measure(benchmark: Any, kind: str, ceilings: None, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Measure one operation beside others and keep the row."""

    def measure(
        operation: str,
        case: str,  # what tells this row from the operation's others, the same on every device
        *,
        shape: str,
        dtype: str,
        backend: str,
        make: Callable[[], tuple],  # fresh random arguments
        call: Call,
        work: Work,
        others: dict[str, Call] | None = None,
        peers: dict[str, Call] | None = None,  # others that are left out, with a warning, where they fail or disagree
        tolerance: float | None = 0.0,  # by which the others may differ; None: not comparable
    ) -> None:
        others = others or {}
        if tolerance is not None:
            check_agreement(call, others, make, tolerance)
        others = others | able(call, peers or {}, make, float("inf") if tolerance is None else tolerance)
        measurement = run_rounds(benchmark, call, make, others, kind)
        row = {"operation": operation, "case": case, "shape": shape, "dtype": dtype, "backend": backend}
        row |= {**measurement.row(), **asdict(work)}
        benchmark.extra_info.update(row)
        pytestconfig.stash[ROWS].append(row)
        if facts.FOLDER in os.environ:
            facts.add("row", **row)

    torch.seed()
    return measure


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    machine = config.stash[MACHINE]
    output_json["pgolf"] = {**machine, "command": "pytest bench/", "quick": QUICK}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    machine, rows = config.stash[MACHINE], config.stash[ROWS]
    if not rows or "ceilings" not in machine:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(results.machine_line(machine))
    for line in results.table([results.priced(row, machine["ceilings"]) for row in rows], markdown=False):
        terminalreporter.write_line(line)
    if (machine["others_share"] or 0.0) > BUSY:
        terminalreporter.write_line("other processes were busy meanwhile: measure again")
    if QUICK:
        terminalreporter.write_line("PGOLF_BENCH_QUICK: too few rounds to mean anything")
