"""The step of a preset on this device: compiled, warmed up, timed, and then profiled by class.

    python -m bench.visit.step loop|first [--peer] [--quick] [SETTING=value ...]

`loop`: the last phase of a run, with looped layers; `first`: before. With `--peer` #1855's own script's step, with the
same attention. The time of the step is kept before the profile is taken.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.harness.training_step import CUDA, DEVICE, make_loader, make_trainer, settings_of, take_step
from bench.step_model.profile import profiled
from bench.visit import facts
from bench.visit.turns import turn

PRESET = "pr1855"
QUICK = {"MODEL_DIM": "64", "NUM_LAYERS": "2", "TRAIN_BATCH_TOKENS": "512", "ATTENTION": "plain"}
WARM, TIMED, PROFILED = 3, 10, 3


def seconds_of(step: Callable[[], object], count: int) -> list[float]:
    """Of each step by itself, on the device's clock where there is one; the host runs ahead as in training."""
    if not CUDA:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def time_step(step: Callable[[], object], quick: bool, **known: object) -> None:
    begin = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    facts.add("compiled", seconds=time.perf_counter() - begin, **known)
    warm, timed = (1, 2) if quick else (WARM, TIMED)
    with turn():
        for _ in range(warm):
            step()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = [1e3 * seconds for seconds in seconds_of(step, timed)]
        peak = torch.cuda.max_memory_allocated() / 1e6 if CUDA else None
        facts.add("step", ms=statistics.median(times), all_ms=times, peak_mb=peak, **known)


def time_ours(phase: str, environ: dict[str, str], folder: Path, quick: bool) -> None:
    settings = settings_of("demo" if quick else PRESET, **environ)
    trainer = make_trainer(settings, folder, last_phase=phase == "loop")
    execution = trainer.model.execution
    known = {"phase": phase, "settings": environ, "tokens": settings.train_batch_tokens,
             "looping": trainer.model.looping, "attention": execution.attention, "fused": sorted(execution.fused),
             "graphs": trainer.cuda_graphs}  # fmt: skip
    time_step(partial(take_step, trainer), quick, **known)
    with turn():
        profile = profiled(trainer, 1 if quick else PROFILED)
    facts.add("profile", **profile)
    if CUDA:
        facts.add("memory", peak_mb=torch.cuda.max_memory_allocated() / 1e6)


def time_peer(phase: str, environ: dict[str, str], folder: Path, quick: bool) -> None:
    from bench.peers import contenders

    settings = settings_of("demo" if quick else PRESET, **environ)
    trainer = make_trainer(settings, folder, last_phase=phase == "loop")
    attention, looping = trainer.model.execution.attention, trainer.model.looping
    del trainer
    found = contenders("training_step", "pr_1855")
    if not found:
        raise SystemExit("PGOLF_PEERS has no checkout of #1855's script")
    for name, make in found.items():
        time_step(
            make(settings, attention, looping, make_loader(settings, folder), DEVICE), quick, phase=phase, peer=name
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The step of a preset on this device.")
    parser.add_argument("phase", choices=("loop", "first"))
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="SETTING=value")
    options = parser.parse_intermixed_args(arguments)
    environ = dict(setting.split("=", 1) for setting in options.settings)
    if options.quick:
        environ = {**environ, **QUICK}
        if not CUDA:
            environ.pop("CUDA_GRAPHS", None)
    with tempfile.TemporaryDirectory() as folder:
        run = time_peer if options.peer else time_ours
        run(options.phase, environ, Path(folder), options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
