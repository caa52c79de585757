"""How every benchmark here measures.

The operation and what it is compared with run in one process, in alternating order, each round on another set of random
inputs; the sets together are larger than the cache. A figure is the median over the rounds, a ratio the median of the
rounds' own ratios. On CUDA the device's events take the time, with a synchronisation after each call. A call is
captured in a graph once and replayed, so that the host's launches cost nothing; where it cannot be captured, a pause
queued in front hides up to about a millisecond of them, and the row says "calls" instead of "graph". The memory that a
call takes there is measured after the rounds, one call of each contender.

pytest-benchmark keeps the statistics: its timer is `Clock.now`, which the operation's measured times move afterwards.
"""

import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.visit.turns import turn
from pgolf.errors import one_line

QUICK = os.environ.get("PGOLF_BENCH_QUICK", "") not in ("", "0")  # few rounds: proves that it runs, measures nothing
BUDGET_SECONDS = 0.05 if QUICK else 1.0  # a benchmark, all contenders together
ROUNDS = (2, 4) if QUICK else (5, 100)  # at least, at most
PAUSE_CYCLES = 2_000_000  # about 1 ms
CPU_CACHE_BYTES = 32 << 20
MOST_INPUT_SETS = 16

Call = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """The least that one call must do: each input byte read once, each output byte written once, FLOPs of products."""

    bytes: int
    flops: int = 0
    tokens: int = 0


@dataclass
class Clock:
    """Seconds of measured work since the start; the timer that pytest-benchmark reads."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds


CLOCK = Clock()


@dataclass
class Measurement:
    """Seconds of every round, for the operation and for each of the others; MB a call of each, where that is known."""

    ours: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)  # "" is the operation
    timed: dict[str, str] = field(default_factory=dict)  # on CUDA, of each: "graph" or "calls"

    def row(self) -> dict[str, Any]:
        """median_ms, others {name: {median_ms, times_faster}}; on CUDA with peak_mb and timed in both places."""
        return {
            "median_ms": 1e3 * statistics.median(self.ours),
            **self._on_cuda(""),
            "others": {
                name: {
                    "median_ms": 1e3 * statistics.median(times),
                    "times_faster": statistics.median(b / a for a, b in zip(self.ours, times, strict=True)),
                    **self._on_cuda(name),
                }
                for name, times in self.others.items()
            },
        }

    def _on_cuda(self, name: str) -> dict[str, Any]:
        known = {"peak_mb": self.peak_mb, "timed": self.timed}
        return {field: values[name] for field, values in known.items() if name in values}


def seconds_per_call(device: str) -> Callable[..., float]:
    """A function that calls `call(*args)` once and returns the seconds that took on `device` ("cuda" or "cpu")."""

    def on_cpu(call: Call, *args: Any) -> float:
        begin = time.perf_counter()
        result = call(*args)
        end = time.perf_counter()
        del result  # freeing is not part of it
        return end - begin

    def on_cuda(call: Call, *args: Any) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        call(*args)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_cuda if device == "cuda" else on_cpu


def captured(call: Call, sets: list[tuple]) -> list[Callable[[], Any]] | None:
    """The call on each set as a graph to be replayed; None where it cannot be captured. It has run before.

    What reads no tensor of the device is not captured: it is a step with a state of its own, or works on the host, of
    which a graph would hold nothing.
    """
    tensors = [value for arguments in sets for value in arguments if isinstance(value, Tensor)]
    if not tensors or not all(tensor.is_cuda for tensor in tensors):
        return None
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # one memory: a replay's results are not needed
    side.wait_stream(torch.cuda.current_stream())
    graphs = []
    try:
        with torch.cuda.stream(side):
            call(*sets[0])  # autograd remembers the stream of its leaves' first use
        torch.cuda.current_stream().wait_stream(side)
        for arguments in sets:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=side):
                call(*arguments)
    except Exception as error:  # whatever a contender does that a graph cannot hold: reading results, say
        torch.cuda.synchronize()
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        warnings.warn(f"timed by calls, not captured: {why}", stacklevel=2)
        return None
    return [graph.replay for graph in graphs]


def input_sets(make: Callable[[], tuple], device: str) -> list[tuple]:
    """As many fresh sets of arguments as exceed the cache three times, at least 2."""
    first = make()
    size = sum(value.nbytes for value in first if isinstance(value, Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE_BYTES
    count = min(MOST_INPUT_SETS, max(2, -(-3 * cache // max(size, 1)))) if size else 1
    return [first, *(make() for _ in range(count - 1))]


def run_rounds(
    benchmark: Any,  # pytest-benchmark's fixture, with CLOCK.now as its timer
    call: Call,
    make: Callable[[], tuple],
    others: dict[str, Call],
    device: str,
) -> Measurement:
    """Warm up, decide on the number of rounds, and measure `call` and the others in alternation."""
    timed = seconds_per_call(device)
    sets = input_sets(make, device)
    contenders = {"": call, **others}
    for contender in contenders.values():  # compile, fill caches and pools
        for _ in range(1 if QUICK else 2):
            timed(contender, *sets[0])
    with turn():
        return _rounds_in_turn(benchmark, contenders, sets, device)


def _rounds_in_turn(benchmark: Any, contenders: dict[str, Call], sets: list[tuple], device: str) -> Measurement:
    timed = seconds_per_call(device)
    # Of each contender, a function and the arguments of each round.
    ways: dict[str, list[tuple]] = {name: [(call, *a) for a in sets] for name, call in contenders.items()}
    measurement = Measurement(others={name: [] for name in contenders if name})
    if device == "cuda":
        for name, call in contenders.items():
            replays = captured(call, sets)
            ways[name] = [(replay,) for replay in replays] if replays else ways[name]
            measurement.timed[name] = "graph" if replays else "calls"
    estimate = sum(timed(*way[-1]) for way in ways.values())
    least, most = ROUNDS
    rounds = max(least, min(most, int(BUDGET_SECONDS / max(estimate, 1e-6))))
    names = list(contenders)

    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            seconds = timed(*ways[name][index % len(sets)])
            (measurement.others[name] if name else measurement.ours).append(seconds)
    if device == "cuda":
        measurement.peak_mb = {name: peak_mb(contender, *sets[0]) for name, contender in contenders.items()}
    recorded = iter(measurement.ours)

    def replay() -> None:
        CLOCK.seconds += next(recorded)

    benchmark.pedantic(replay, rounds=rounds)  # last, so that a benchmark that is stopped leaves nothing
    return measurement


def peak_mb(call: Call, *args: Any) -> float:
    """The most device memory that one call holds beyond what is held before it, its results included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(*args)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return (peak - before) / 1e6


def check_agreement(call: Call, others: dict[str, Call], make: Callable[[], tuple], tolerance: float) -> None:
    """All contenders must compute the same thing: relative error in float64 at most `tolerance`, 0 for equality."""
    arguments = make()
    expected = _flat(call(*arguments))
    for name, other in others.items():
        found = _flat(other(*arguments))
        assert found.shape == expected.shape, f"{name} returns {tuple(found.shape)}, not {tuple(expected.shape)}"
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error <= tolerance, f"{name} differs by {error:.2g}, accepted is {tolerance:g}"


def able(call: Call, peers: dict[str, Call], make: Callable[[], tuple], tolerance: float) -> dict[str, Call]:
    """Those of `peers` that run here and agree; a warning tells what is wrong with each of the others."""
    found = {}
    for name, peer in peers.items():
        try:
            check_agreement(call, {name: peer}, make, tolerance)
        except Exception as error:  # other people's code may raise anything
            lines = str(error).strip().splitlines() or [""]
            warnings.warn(f"peer {name} is left out: {type(error).__name__}: {lines[0]}", stacklevel=2)
        else:
            found[name] = peer
    return found


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return torch.cat([part.detach().reshape(-1).double() for part in parts])
