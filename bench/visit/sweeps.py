"""Launch parameters of the Triton kernels, tried one after another, and the lines that belong into the launch tables.

    python -m bench.visit.sweeps glue|loss|mlp|newton_schulz [--seconds 45] [--quick | --static]

The candidates are in candidates.py. Each is compiled ahead by other processes, compared with the launch in use, and
timed in turns with it; its fact is kept at once. What is "best" for a table must be 2% faster than what is in use, over
all launches of a step. `--quick` runs a few of them in Triton's interpreter on the CPU, and measures nothing;
`--static` compiles all of them for sm_90, with no GPU, and prints what they take.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.harness.measure import captured, input_sets, seconds_per_call
from bench.visit import compiled_ahead, facts
from bench.visit.candidates import Table, apart, families, joined, other_residents
from bench.visit.sweep_calls import QUICK, RECORD, STATIC, Sizes, Timed
from bench.visit.turns import turn
from pgolf.errors import one_line
from pgolf.runtime.host import cores
from pgolf.triton_kernels.row_launches import RowLaunch
from pgolf.triton_kernels.variants import architecture

FAMILIES = tuple(families(QUICK))
SECONDS = 45.0  # compilation and timing; waiting for a turn does not count
TRIAL_SECONDS = 0.08
LEAST_SECONDS = 4.0  # for timing a table, however long its compilation took
ROUNDS = (5, 60)  # at least, at most
WORTH = 0.02  # a smaller gain keeps what is in use
PROCESSES = 4


class DeviceLost(Exception):
    """After such an error nothing runs on the device any more."""


@contextlib.contextmanager
def launched(table: Table, candidate: Any, device_architecture: int) -> Iterator[None]:
    """`candidate` stands in the module's table for devices of that architecture; afterwards what stood there."""
    key = (device_architecture, *table.key) if table.key else device_architecture
    launches = table.module.LAUNCHES
    before = dict(launches)
    launches[key] = table.entry(candidate)
    try:
        yield
    finally:
        launches.clear()
        launches.update(before)


@dataclass
class Prepared:
    """A launcher with its inputs, what it gives with the launch in use, and how that is called."""

    timed: Timed
    sets: list[tuple]
    expected: list[Tensor]
    present: list[Any]


@dataclass
class Sweep:
    """One table's trials. `seconds` are left, of compilation and timing."""

    table: Table
    sizes: Sizes
    seconds: float
    pool: ProcessPoolExecutor | None
    small: Table | None = None  # the same on little data, to be compiled
    rounds: tuple[int, int] = ROUNDS
    ratios: dict[tuple[Any, str], float] = field(default_factory=dict)  # (candidate, launcher): time over that in use
    present_ms: dict[str, float] = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    tried: int = 0

    @property
    def architecture(self) -> int:
        return architecture(torch.device(self.sizes.device))

    def run(self, candidates: list[Any]) -> None:
        present = self.table.candidates[0]
        self.compile([present, *candidates])
        with turn():
            begin, seconds = time.perf_counter(), max(self.seconds, LEAST_SECONDS)
            if not self.prepared:
                self.prepare(present)
            for candidate in candidates:
                if time.perf_counter() - begin > seconds:
                    break
                self.tried += 1
                for prepared in self.prepared:
                    self.try_one(candidate, prepared)
            self.seconds -= time.perf_counter() - begin

    def compile(self, candidates: list[Any]) -> None:
        """By the other processes. What fails will fail again where it is tried, and is told there."""
        if self.pool is None or self.small is None:
            return
        begin = time.perf_counter()
        sources = []
        for timed in self.small.timed:
            arguments = timed.make()
            for candidate in candidates:
                with launched(self.table, candidate, self.architecture):
                    sources += compiled_ahead.sources_of(lambda timed=timed, given=arguments: timed.call(*given))
        distinct = {repr(source): source for source in sources}
        list(self.pool.map(compiled_ahead.warm_up, distinct.values()))
        self.seconds -= time.perf_counter() - begin

    def prepare(self, present: Any) -> None:
        with launched(self.table, present, self.architecture):
            for timed in self.table.timed:
                sets = input_sets(timed.make, self.sizes.device)
                expected = tensors_of(timed.call(*sets[0]))
                self.prepared.append(Prepared(timed, sets, expected, self.calls(timed, sets, present)))

    def try_one(self, candidate: Any, prepared: Prepared) -> None:
        timed, known = prepared.timed, {"table": self.table.name, "launch": repr(candidate)}
        try:
            with launched(self.table, candidate, self.architecture):
                error = difference(tensors_of(timed.call(*prepared.sets[0])), prepared.expected)
                if not error <= self.table.tolerance:
                    facts.add("trial", **known, kernel=timed.name, error=f"result differs by {error:.2g}")
                    return
                new = self.calls(timed, prepared.sets, candidate)
            seconds = alternate(new, prepared.present, self.sizes.device, self.rounds)
        except Exception as error:  # of the compiler, of the launch
            facts.add("trial", **known, kernel=timed.name, error=f"{type(error).__name__}: {one_line(error, 200)}")
            check_device(self.sizes.device)
            return
        ms, present_ms = (1e3 * statistics.median(times) / timed.repeat for times in zip(*seconds, strict=True))
        ratio = statistics.median(new / old for new, old in seconds)
        self.ratios[candidate, timed.name] = ratio
        self.present_ms.setdefault(timed.name, present_ms)
        facts.add("trial", **known, kernel=timed.name, ms=ms, present_ms=present_ms, times_faster=1 / ratio,
                  rounds=len(seconds), **self.quick())  # fmt: skip

    def calls(self, timed: Timed, sets: list[tuple], candidate: Any) -> list[Any]:
        """Of each set of inputs a call without arguments, as often as the launcher says; on a GPU a captured graph."""

        def repeated(*arguments: Any) -> None:
            with launched(self.table, candidate, self.architecture):
                for _ in range(timed.repeat):
                    timed.call(*arguments)

        replays = captured(repeated, sets) if self.sizes.device == "cuda" else None
        return replays or [lambda given=given: repeated(*given) for given in sets]

    def quick(self) -> dict[str, bool]:
        return {"quick": True} if self.sizes == QUICK else {}

    def cost(self, choice: dict[str, float]) -> float:
        """Milliseconds of a step, of ratios to what is in use by launcher; infinite where one is missing."""
        return sum(
            timed.weight * self.present_ms[timed.name] * choice.get(timed.name, float("inf"))
            for timed in self.table.timed
            if timed.weight and timed.name in self.present_ms
        )

    def ratios_of(self, candidate: Any) -> dict[str, float]:
        return {name: ratio for (tried, name), ratio in self.ratios.items() if tried == candidate}

    def best_of(self, candidates: list[Any]) -> tuple[Any, float]:
        """The best candidate, put together from alike ones: for each kernel the best place. And its cost."""
        best, least = self.table.candidates[0], self.cost({timed.name: 1.0 for timed in self.table.timed})
        for one in candidates:
            alike = [other for other in candidates if apart(other) == apart(one)]
            built, ratios = one, {}
            for place in dict.fromkeys(timed.place for timed in self.table.timed):
                names = [timed.name for timed in self.table.timed if timed.place == place]
                own = alike if place is not None else [one]
                parts = {other: {n: r for n, r in self.ratios_of(other).items() if n in names} for other in own}
                chosen = min(own, key=lambda other: self.cost_of(names, parts[other]))
                built = joined(built, place, chosen)
                ratios |= parts[chosen]
            if self.cost(ratios) < least:
                best, least = built, self.cost(ratios)
        return best, least

    def cost_of(self, names: list[str], ratios: dict[str, float]) -> float:
        counted = [timed for timed in self.table.timed if timed.name in names]
        return sum(
            (timed.weight or 1e-6) * self.present_ms.get(timed.name, 0.0) * ratios.get(timed.name, float("inf"))
            for timed in counted
        )

    def tell(self, candidates: list[Any]) -> None:
        """The line for the launch table."""
        present = self.table.candidates[0]
        now = self.cost({timed.name: 1.0 for timed in self.table.timed})
        best, cost = self.best_of(candidates)
        gain = 1 - cost / now if now else 0.0
        if gain < WORTH:
            best = present
        line = f"{self.table.module.__name__.rpartition('.')[2]}.LAUNCHES: {self.table.entry(best)!r}"
        facts.add("best", table=self.table.name, launch=repr(best), line=line, kept=best == present,
                  times_faster=now / cost if cost else 1.0, step_ms_saved=(now - cost) if best != present else 0.0,
                  tried=self.tried, **self.quick())  # fmt: skip
        kept = "as it is" if best == present else f"{now / cost:.3f} times as fast"
        kept += " (quick: this means nothing)" * bool(self.quick())
        print(f"{line}  # {kept}, of {self.tried} tried", flush=True)


def sweep(state: Sweep, few: int | None = None) -> None:
    """All of a table's candidates, or the first few; then, of the best, other numbers of programs."""
    table = state.table
    candidates = list(dict.fromkeys(table.candidates))[: few or None]
    state.run(candidates)
    best, _ = state.best_of(candidates)
    if isinstance(best, RowLaunch) and not few:
        others = [other for other in other_residents(best) if other not in candidates]
        state.run(others)
        candidates += others
    state.tell(candidates)


def alternate(new: list[Any], old: list[Any], device: str, rounds: tuple[int, int]) -> list[tuple[float, float]]:
    """Seconds of both, round by round, in alternating order."""
    timed, least, most = seconds_per_call(device), *rounds
    found: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(found) < least or (len(found) < most and time.perf_counter() - begin < TRIAL_SECONDS):
        index = len(found) % len(new)
        if len(found) % 2:
            first = timed(old[index])
            found.append((timed(new[index]), first))
        else:
            first = timed(new[index])
            found.append((first, timed(old[index])))
    return found


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a result, which may be nested."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in tensors_of(part)] if result is not None else []


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor; NaN where there is one."""
    worst = 0.0
    for new, old in zip(found, expected, strict=True):
        error = (new.float() - old.float()).norm() / old.float().norm().clamp_min(1e-30)
        worst = max(worst, float(error)) if error == error else float("nan")
    return worst


def check_device(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        facts.add("device lost", error=one_line(error, 200))
        raise DeviceLost(one_line(error, 200)) from None


def tables_of(family: str, sizes: Sizes) -> list[Table]:
    return families(sizes)[family]()


def static(family: str) -> None:
    """What every candidate takes on sm_90: registers, shared memory, resident blocks, and why it is of no use."""
    with compiled_ahead.pool(min(PROCESSES, cores())) as pool, compiled_ahead.without_a_device():
        asked: dict[str, tuple[dict[str, str], compiled_ahead.Source]] = {}
        for table in tables_of(family, STATIC):
            for candidate, timed in itertools.product(table.candidates, table.timed):
                with launched(table, candidate, 0):
                    arguments = timed.make()
                    sources = compiled_ahead.sources_of(lambda timed=timed, given=arguments: timed.call(*given))
                known = {"table": table.name, "launch": repr(candidate), "kernel": timed.name}
                for source in sources:
                    # On a GPU the loss has lines of assembly.
                    source = replace(source, constants=_assembly(source))
                    asked.setdefault(repr(source), (known, source))
        found = pool.map(compiled_ahead.compiled, (source for _, source in asked.values()))
        for (known, _), (takes, why) in zip(asked.values(), found, strict=True):
            sizes = {} if takes is None else {
                "registers": takes.registers, "shared_bytes": takes.shared_bytes, "blocks": takes.blocks_per_sm,
                "wgmma": takes.wgmma_instructions,
            }  # fmt: skip
            facts.add("static", **known, **sizes, **({"error": why} if why else {}))


def _assembly(source: compiled_ahead.Source) -> dict[tuple, Any]:
    position = list(source.signature).index("ASSEMBLY") if "ASSEMBLY" in source.signature else None
    return source.constants if position is None else {**source.constants, (position,): True}


def run(family: str, seconds: float, quick: bool) -> None:
    sizes = QUICK if quick else RECORD
    with contextlib.ExitStack() as stack:
        pool = None if quick else stack.enter_context(compiled_ahead.pool(PROCESSES))
        tables = tables_of(family, sizes)
        smalls = [None] * len(tables) if quick else tables_of(family, replace(STATIC, device=sizes.device))
        work = [len(table.candidates) * len(table.timed) for table in tables]
        for table, small, trials in zip(tables, smalls, work, strict=True):
            state = Sweep(table, sizes, seconds * trials / sum(work), pool, small, (1, 1) if quick else ROUNDS)
            try:
                sweep(state, 2 if quick else None)
            except DeviceLost:
                raise
            except Exception as error:  # the other tables may still come
                facts.add("failed", table=table.name, error=f"{type(error).__name__}: {one_line(error, 200)}")
                check_device(sizes.device)
            del state
            if sizes.device == "cuda":
                torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Launch parameters of the Triton kernels.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of compilation and timing (%(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="in the interpreter, a few: proves that it runs")
    kind.add_argument("--static", action="store_true", help="compile for sm_90, with no GPU, and print what it takes")
    options = parser.parse_args(arguments)
    if options.static:
        static(options.family)
        return 0
    if options.quick and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, which has happened
        os.execv(sys.executable, [sys.executable, "-m", "bench.visit.sweeps", *(arguments or sys.argv[1:])])
    if not options.quick and not torch.cuda.is_available():
        parser.error("no CUDA device; --quick and --static need none")
    try:
        run(options.family, options.seconds, options.quick)
    except DeviceLost as error:
        print(f"sweeps {options.family}: the device is lost: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
