"""Kernels compiled by several processes into Triton's cache before this one launches them, on a GPU or with none.

A launch is asked for as it will be made; Triton's own hook hands out what it would have compiled and keeps the launch
from happening. Forked processes compile that; they use no GPU. Triton's compiler holds Python's lock, so threads would
take turns.
"""

import contextlib
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from bench.kernels.aot import Resources, read_cubin, waiting_wgmma
from pgolf.errors import one_line

LARGEST_SHARED_BYTES = 227 * 1024  # of a block on sm_90


@dataclass(frozen=True)
class Source:
    """What Triton compiles for one launch. Goes to another process."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]
    architecture: int

    def compile(self) -> Any:
        function = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=self.options)


def sources_of(launch: Callable[[], Any]) -> list[Source]:
    """Of the kernels that `launch` launches and that this process has not compiled yet. They are not launched."""
    found: list[Source] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {
            name: _tuples(value) for name, value in json.loads(compile["specialization_data"])["options"].items()
        }
        signature, constants, attributes = compile["signature"], compile["constants"], compile["configs"][0]
        function = fn.jit_function
        architecture = driver.active.get_current_target().arch
        found.append(
            Source(
                function.fn.__module__, function.fn.__name__, signature, constants, attributes, options, architecture
            )
        )
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        launch()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return found


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def compiled(source: Source) -> tuple[Resources | None, str]:
    """(what the kernel takes, "") or (None, why it is of no use)."""
    try:
        kernel = source.compile()
        found = read_cubin(kernel.asm["cubin"], source.options["num_warps"], kernel.metadata.shared)
        waiting = waiting_wgmma(kernel.asm["ptx"], source.architecture)
    except Exception as error:  # whatever the compiler or the assembler says
        return None, f"{type(error).__name__}: {one_line(error, 200)}"
    if found.spill_instructions:
        return found, f"{found.spill_instructions} spills"
    if found.shared_bytes > LARGEST_SHARED_BYTES:
        return found, f"{found.shared_bytes} bytes of shared memory, {LARGEST_SHARED_BYTES} at most"
    return found, waiting


def warm_up(source: Source) -> str:
    """Compile into the cache; why not, or nothing."""
    try:
        source.compile()
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 200)}"
    return ""


@contextlib.contextmanager
def pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Forked, so it must be begun before this process touches the GPU or begins threads."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as executor:
        for _ in executor.map(abs, range(4 * processes)):  # all of them are there now
            pass
        yield executor


class Hopper:
    """Stands for Triton's driver of an sm_90 device that is not there: enough to compile, not to launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def without_a_device() -> Iterator[None]:
    before = driver._active
    driver.set_active(Hopper())
    try:
        yield
    finally:
        driver._active = before
