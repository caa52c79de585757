"""Every Triton kernel that Inductor writes for a step of a preset, compiled to Hopper's machine code without a GPU.

    python -m bench.step_model.compile_step [--preset record] [--tokens N] [--gpus 8] [--first-phase | --loop]
        [--glue on|off] [--first-configuration] [--json [FILE]] [SETTING=value ...]

Both phases, FUSED_GLUE on and off, forward, backward and optimiser (generated.py). Inductor gives a kernel several
configurations, compiles them all and times them at the first launch; so does this, but for the timing. Each compiler
runs in a process of its own, and what kills it is a failure of that kernel alone. One kernel that several graphs have
under other names is compiled once.

A kernel that uses local memory keeps there what does not fit into its registers (spills), or an array whose index is
known at run time only: the slow path of sin and cos has one of 28 bytes. Inductor refuses configurations with more than
64 bytes of it, unless it has only one. Exit status 1 if a kernel did not compile.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.step_model.generated import Source, optimiser_sources, step_sources
from bench.step_model.step_model import resolve, side_by_side, table
from pgolf.errors import PgolfError, one_line
from pgolf.model import ModelConfig
from pgolf.model.execution import FUSABLE
from pgolf.runtime.host import cores
from pgolf.settings import Settings

PHASES = {False: "pre-loop", True: "loop"}
GLUE = {"on": FUSABLE, "off": frozenset[str]()}
OPTIMISER = "optimiser"


@dataclass(frozen=True)
class Configuration:
    """One way to launch a kernel, and what its machine code takes."""

    options: str  # "XBLOCK 1024, 4 warps"
    registers: int  # a thread
    local_bytes: int  # of memory a thread
    local_instructions: int  # that read or write it
    shared_bytes: int  # a block


@dataclass(frozen=True)
class Compiled:
    """One kernel in its configurations, the one that Inductor names first first. `failure`: "" or the error's line."""

    configurations: tuple[Configuration, ...]
    failure: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """The generated kernels of one phase with one kind of glue, or of the optimiser."""

    name: str  # "loop, FUSED_GLUE=on"
    sources: list[Source]


def steps_of(
    settings: Settings, tokens: int, phases: Iterable[bool] = PHASES, glue: Iterable[str] = GLUE
) -> list[Step]:
    """Every kind of step that a run of these settings has, the optimiser's last; as many traces at once as cores."""
    config = ModelConfig.of(settings)
    phases = [looping for looping in phases if config.num_loops or not looping]
    packed = settings.loader == "documents"
    kinds = [(looping, kind) for looping in sorted(phases, reverse=True) for kind in glue]
    jobs = [(config, looping, tokens, settings.train_seq_len, packed, GLUE[kind]) for looping, kind in kinds]
    traced = side_by_side(step_sources, jobs)
    steps = [
        Step(f"{PHASES[looping]}, FUSED_GLUE={kind}", sources)
        for (looping, kind), sources in zip(kinds, traced, strict=True)
    ]
    return [*reversed(steps), Step(OPTIMISER, optimiser_sources(config, settings))]


def compile_all(sources: Iterable[Source], all_configurations: bool = True) -> dict[str, Compiled]:
    """{`Source.anonymous`: what became of it}, by as many processes as cores."""
    texts = list(dict.fromkeys(source.anonymous for source in sources))
    found: dict[str, Compiled] = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(BrokenProcessPool), _workers(folder, min(cores(), len(texts) or 1)) as pool:
            futures = [(text, pool.submit(compile_text, text, all_configurations)) for text in texts]
            for text, future in futures:
                found[text] = future.result()
        for text in texts:
            if text not in found:  # some process died: who was it?
                try:
                    with _workers(folder, 1) as pool:
                        found[text] = pool.submit(compile_text, text, all_configurations).result()
                except BrokenProcessPool:
                    found[text] = Compiled((), "the compiler's process died", 0.0)
    return found


def _workers(folder: str, processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker, (folder,))


def _begin_worker(folder: str) -> None:
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
    logging.getLogger("torch._inductor").setLevel(logging.CRITICAL)  # a failure is a row of ours


def compile_text(text: str, all_configurations: bool = True, name: str = Source.ANONYMOUS) -> Compiled:
    """What Inductor's own compiling process makes of a kernel's source."""
    begin = time.perf_counter()
    try:
        found = tuple(_configurations(text, name, all_configurations))
    except Exception as error:  # of three compilers
        return Compiled((), f"{type(error).__name__}: {one_line(_last_line(error))}", time.perf_counter() - begin)
    return Compiled(found, "", time.perf_counter() - begin)


def _last_line(error: Exception) -> str:
    return ([line for line in str(error).splitlines() if line.strip()] or [""])[-1].strip()


def _configurations(text: str, name: str, every: bool) -> Iterable[Configuration]:
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    from bench.kernels.aot import local_memory

    binaries = []
    compiles = triton.compile

    def keeping(*arguments, **options):
        binaries.append(compiles(*arguments, **options))
        return binaries[-1]

    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None),  # there is none to ask
        mock.patch.object(triton, "compile", keeping),
    ):
        kernel = getattr(PyCodeCache.load(text), name)
        configurations = list(kernel.configs)
        for configuration in configurations if every else configurations[:1]:
            kernel._precompile_config(configuration)
            binary = binaries.pop()
            sizes = [f"{size} {value}" for size, value in configuration.kwargs.items()]
            yield Configuration(
                ", ".join([*sizes, f"{configuration.num_warps} warps"]),
                *local_memory(binary.asm["cubin"]),
                binary.metadata.shared,
            )


HEADER = ["step", "kernels", "launches", "compiled", "failed", "in local memory", "most registers", "s"]


def step_row(step: Step, compiled: dict[str, Compiled]) -> list[str]:
    """Kernels that differ; those in local memory, by Inductor's first configuration | by any; seconds of one core."""
    found = [compiled[text] for text in {source.anonymous for source in step.sources}]
    good = [kernel for kernel in found if not kernel.failure]
    first = sum(kernel.configurations[0].local_instructions > 0 for kernel in good)
    spilling = sum(any(c.local_instructions for c in kernel.configurations) for kernel in good)
    registers = [c.registers for kernel in good for c in kernel.configurations]
    return [
        step.name,
        str(len(found)),
        str(sum(source.launches for source in step.sources)),
        str(len(good)),
        str(len(found) - len(good)),
        f"{first} | {spilling}",
        str(max(registers, default=0)),
        f"{sum(kernel.seconds for kernel in found):.0f}",
    ]


def text_report(steps: Sequence[Step], compiled: dict[str, Compiled]) -> list[str]:
    lines = table([HEADER, *(step_row(step, compiled) for step in steps)])
    places = _places(steps)
    for title, wanted in (
        ("did not compile", lambda kernel: kernel.failure),
        ("in local memory", lambda kernel: any(c.local_instructions for c in kernel.configurations)),
    ):
        chosen = [text for text, kernel in compiled.items() if wanted(kernel)]
        lines += ["", f"{title}: {len(chosen) or 'none'}"]
        for text in chosen:
            source, names = places[text]
            lines += ["", f"{source.name} ({source.part}; {'; '.join(names)})", f"  of {_functions(source)}"]
            lines += [f"  {line}" for line in _details(compiled[text])]
    return lines


def _places(steps: Sequence[Step]) -> dict[str, tuple[Source, list[str]]]:
    """Of each text one source and the steps that have it."""
    found: dict[str, tuple[Source, list[str]]] = {}
    for step in steps:
        for source in step.sources:
            _, names = found.setdefault(source.anonymous, (source, []))
            if step.name not in names:
                names.append(step.name)
    return found


def _functions(source: Source) -> str:
    return ", ".join(sorted(source.functions)) or "no function of the model"


def _details(kernel: Compiled) -> list[str]:
    if kernel.failure:
        return [kernel.failure]
    return [
        f"{c.options}: {c.registers} registers, {c.local_bytes} bytes and {c.local_instructions} instructions of local"
        " memory"
        for c in kernel.configurations
    ]


def as_dict(steps: Sequence[Step], compiled: dict[str, Compiled]) -> dict:
    """The whole as JSON: steps with the launches of each kernel, and what each kernel takes."""
    places = _places(steps)
    number = {text: index for index, text in enumerate(places)}
    launches = {step.name: {str(number[s.anonymous]): s.launches for s in step.sources} for step in steps}
    kernels = [
        {"name": source.name, "part": source.part, "functions": sorted(source.functions), **asdict(compiled[text])}
        for text, (source, _) in places.items()
    ]
    return {"steps": launches, "kernels": kernels}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the generated Triton kernels of a step for sm_90.")
    parser.add_argument("--preset", default="record")
    parser.add_argument("--tokens", type=int, help="on each GPU; default: the preset's batch over the GPUs")
    parser.add_argument("--gpus", type=int, default=8)
    phase = parser.add_mutually_exclusive_group()
    phase.add_argument("--first-phase", action="store_true", help="only before depth recurrence starts")
    phase.add_argument("--loop", action="store_true", help="only after")
    parser.add_argument("--glue", choices=sorted(GLUE), help="only with FUSED_GLUE on or off")
    parser.add_argument(
        "--first-configuration", action="store_true", help="of each kernel only what Inductor names first"
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="instead of the tables, or beside them")
    parser.add_argument("settings", nargs="*", metavar="SETTING=value")
    options = parser.parse_args(arguments)
    for name in ("triton", "torch._inductor"):
        if importlib.util.find_spec(name) is None:
            parser.error(f"{name} is not installed, which writes and compiles the kernels (Linux): pip install triton")
    begin = time.perf_counter()
    try:
        settings, tokens = resolve(options.preset, options.tokens, options.gpus, _given(options.settings))
    except (PgolfError, ValueError) as error:
        parser.error(str(error))
    phases = [True] if options.loop else [False] if options.first_phase else list(PHASES)
    if options.loop and not ModelConfig.of(settings).num_loops:
        parser.error(f"--loop: {settings.preset} has no loops (NUM_LOOPS=0)")
    steps = steps_of(settings, tokens, phases, [options.glue] if options.glue else GLUE)
    traced = time.perf_counter()
    compiled = compile_all((source for step in steps for source in step.sources), not options.first_configuration)
    end = time.perf_counter()
    head = {"preset": settings.preset, "tokens": tokens, **_versions()}
    seconds = {"seconds_tracing": round(traced - begin, 1), "seconds_compiling": round(end - traced, 1)}
    if options.json:
        text = json.dumps({**head, **seconds, **as_dict(steps, compiled)}) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text, encoding="utf-8")
    if options.json != "-":
        print(", ".join(f"{name} {value}" for name, value in head.items()), end="; sm_90\n\n")
        print("\n".join(text_report(steps, compiled)))
        print(f"\n{len(compiled)} kernels differ; {traced - begin:.0f} s to trace, {end - traced:.0f} s to compile")
    return int(any(kernel.failure for kernel in compiled.values()))


def _versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _given(settings: Sequence[str]) -> dict[str, str]:
    """{"NUM_LAYERS": "2"} of "NUM_LAYERS=2"."""
    for text in settings:
        if "=" not in text:
            raise ValueError(f"{one_line(text, 80)}: expected SETTING=value")
    return dict(text.split("=", 1) for text in settings)


if __name__ == "__main__":
    sys.exit(main())
