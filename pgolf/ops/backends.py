"""Which implementation of an operation runs: `reference` (plain PyTorch), `native` (C++/CUDA) or `triton`.

The choice is made from the device of the tensors at the time of the call: the first backend in the order of
registration that works on that device, else `reference`. On CUDA, falling back to `reference` warns once for each
operation and is remembered in `fallbacks()`. `PGOLF_BACKEND=name` or `with backend(name):` forces one backend for
every operation; where an operation lacks it, `BackendUnavailable` tells why and what mends it.

Operations ask `choose` in one of two places, and `torch.compile(fullgraph=True)` keeps one graph in both:

- inside a registered `torch.library` operation, which the compiler does not look into (`pack_bits`): the choice is made
  at every call, compiled or not;
- in traced Python (`newton_schulz`), from where it travels into the registered operations as an argument: the choice is
  a constant of the graph, and a forced backend is a guard of it, so forcing another one compiles anew.
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from pgolf.errors import PgolfError, UserError, one_line
from pgolf.ops import compiler_messages

BACKENDS = ("reference", "native", "triton")

_devices: dict[str, dict[str, tuple[str, ...]]] = {}  # operation -> backend -> device types, preferred backend first
_used: dict[str, str] = {}
_fallbacks: list[str] = []
_forced: str | None = None


class BackendUnavailable(PgolfError, RuntimeError):
    """A backend was forced that an operation does not have on this machine or for these tensors.

    The message says why not and what mends it. A RuntimeError and, as other refusals,
    a PgolfError.

    Raises:
        Nothing itself; every operation with a choice of backends raises it, before anything runs.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> with ops.backend("triton"):
        ...     ops.gptq(torch.ones(1, 4), torch.eye(4), bits=6)
        Traceback (most recent call last):
        ...
        pgolf.ops.backends.BackendUnavailable: gptq: backend 'triton' cannot run on cpu: gptq has no triton kernel
    """


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run an operation, as `available` tells it.

    Attributes:
        ok: whether it can.
        reason: where it runs, or why it does not; "" if there is nothing to say.
        mend: what to do about it; "" if nothing.
    Raises:
        Nothing.
    Example:
        >>> from pgolf import ops
        >>> ops.available()["gptq"]["triton"]
        Availability(ok=False, reason='gptq has no triton kernel', mend='')
    """

    ok: bool
    reason: str = ""
    mend: str = ""


def register(op: str, **devices: tuple[str, ...]) -> None:
    """Announce the kernels of `op`: `register("pack_bits", native=("cpu", "cuda"))`. `reference` is always there.

    With several kernels for one device type, the first named is preferred.
    """
    for name in devices:
        _check_name(name)
    _devices[op] = devices


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every operation of this process while the block runs. Nests; restores on an exception.

    `PGOLF_BACKEND=name` does it for a whole process. Compiled code is compiled anew where the forced backend changes.

    Args:
        name: one of `ops.BACKENDS`: "reference" (plain PyTorch), "native" (C++, CUDA) or "triton".
    Raises:
        ValueError: an unknown name. An operation that lacks the backend raises `BackendUnavailable` when it is called.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> with ops.backend("reference"):
        ...     packed = ops.pack_bits(torch.zeros(8, dtype=torch.int8), bits=6)
        >>> ops.used()["pack_bits"]
        'reference'
    """
    global _forced
    _check_name(name)
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def choose(op: str, device_type: str, no_kernel_for: str = "") -> str:
    """Name of the backend that runs `op` on tensors of `device_type` ("cpu", "cuda", ...).

    `no_kernel_for`: what about these arguments no kernel of `op` takes ("float64"); then it is `reference`, and forcing
    a kernel raises.
    """
    return _choose(op, device_type, _forced, no_kernel_for)


def _choose(op: str, device_type: str, forced: str | None, no_kernel_for: str) -> str:
    # Under torch.compile this runs once, at trace time: the book-keeping below is not part of any graph.
    compiler_messages.shorten()
    forced = forced or _forced_by_environment()
    if forced is not None:
        found = _availability(op, forced, device_type)
        if not found.ok:
            raise BackendUnavailable(
                f"{op}: backend {forced!r} cannot run on {device_type}: {found.reason}"
                + (f" (mend: {found.mend})" if found.mend else "")
            )
        if no_kernel_for and forced != "reference":
            raise BackendUnavailable(f"{op}: backend {forced!r} has no kernel for {no_kernel_for}; only reference does")
        chosen = forced
    else:
        chosen = _preferred(op, device_type, no_kernel_for)
    _used[op] = chosen
    return chosen


# What torch.compiler.assume_constant_result does, but for importing the compiler: a second that those who compile
# nothing need not wait.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _preferred(op: str, device_type: str, no_kernel_for: str) -> str:
    kernels = _devices[op]
    for name, device_types in kernels.items():
        if not no_kernel_for and device_type in device_types and _availability(op, name, device_type).ok:
            return name
    if device_type == "cuda" and op not in _fallbacks:
        _fallbacks.append(op)
        reasons = [f"{name}: {_availability(op, name, 'cuda').reason}" for name in kernels] or ["no kernel yet"]
        if no_kernel_for:
            reasons = [f"no kernel for {no_kernel_for}"]
        warnings.warn(f"pgolf: {op} runs as plain PyTorch on CUDA ({'; '.join(reasons)})", stacklevel=4)
    return "reference"


def available() -> dict[str, dict[str, Availability]]:
    """For every operation and backend: can it run on this machine, where or why not, and the mend.

    Returns:
        {operation: {backend: `Availability`}}, for all of `ops.BACKENDS`.
    Raises:
        Nothing.
    Example:
        >>> from pgolf import ops
        >>> ops.available()["newton_schulz"]["reference"].ok
        True
    """
    return {op: {name: _anywhere(op, name) for name in BACKENDS} for op in sorted(_devices)}


def used() -> dict[str, str]:
    """The backend that each operation chose last, since the process started.

    Returns:
        {operation: backend}, of those that ran.
    Raises:
        Nothing.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> _ = ops.newton_schulz(torch.randn(4, 4))
        >>> ops.used()["newton_schulz"] in ops.BACKENDS
        True
    """
    return dict(_used)


def fallbacks() -> list[str]:
    """Operations that ran as `reference` on CUDA because no kernel could, in order of first use. Each warned once.

    Returns:
        A list of names; empty where everything ran by a kernel, or on the CPU.
    Raises:
        Nothing.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> before = ops.fallbacks()
        >>> _ = ops.newton_schulz(torch.randn(4, 4))  # on the CPU
        >>> ops.fallbacks() == before
        True
    """
    return list(_fallbacks)


def native() -> ModuleType:
    """The compiled module `pgolf._native`."""
    return importlib.import_module("pgolf._native")


def check_environment(operations: Iterable[str], device_type: str) -> None:
    """Refuse now what PGOLF_BACKEND would make each of `operations` refuse when it is called there, perhaps much later
    and by the compiler, which adds pages to the line."""
    forced = _forced_by_environment()
    if forced is None:
        return
    for op in operations:
        found = _availability(op, forced, device_type)
        if not found.ok:
            raise BackendUnavailable(f"PGOLF_BACKEND={forced}: {found.reason}, and this run needs {op}")


def _forced_by_environment() -> str | None:
    name = os.environ.get("PGOLF_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise UserError(f"PGOLF_BACKEND={one_line(name, 80)}: no such backend; accepted are {', '.join(BACKENDS)}")
    return name


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown backend {name!r}; accepted are {', '.join(BACKENDS)}")


def _anywhere(op: str, name: str) -> Availability:
    """Availability of a backend on the best device type of this machine, with a word on the others."""
    if name == "reference":
        return Availability(True, "everywhere")
    device_types = _devices[op].get(name, ())
    if not device_types:
        return Availability(False, f"{op} has no {name} kernel")
    if name == "triton" and _interpreting():
        device_types = ("cpu",)
    found = {device_type: _availability(op, name, device_type) for device_type in device_types}
    good = [device_type for device_type, answer in found.items() if answer.ok]
    if not good:
        return next(iter(found.values()))
    missing = [f"not on {device_type}: {answer.reason}" for device_type, answer in found.items() if not answer.ok]
    return Availability(True, "; ".join(["on " + " and ".join(good), *missing]))


def _availability(op: str, name: str, device_type: str) -> Availability:
    if name == "reference":
        return Availability(True, "everywhere")
    device_types = _devices[op].get(name, ())
    if not device_types:
        return Availability(False, f"{op} has no {name} kernel")
    if name == "triton":
        return _triton(device_type)
    if device_type not in device_types:
        return Availability(False, f"{op} has no {name} kernel for {device_type}")
    return _native_cuda() if device_type == "cuda" else _native_cpu()


@lru_cache
def _native_cpu() -> Availability:
    try:
        native()
    except ImportError as error:
        reason = "pgolf._native is not built" if importlib.util.find_spec("pgolf._native") is None else str(error)
        return Availability(False, reason, "build it with: pip install -e .")
    return Availability(True)


@lru_cache
def _native_cuda() -> Availability:
    built = _native_cpu()
    if not built.ok:
        return built
    info = native().build_info()
    if not info["cuda"]:
        return Availability(
            False,
            f"pgolf._native was built without CUDA ({info['cuda_reason']})",
            "install the CUDA toolkit (nvcc), then: PGOLF_CUDA=on pip install -e .",
        )
    if not torch.cuda.is_available():
        return Availability(False, "PyTorch finds no CUDA device", "run on a machine with an NVIDIA GPU")
    return Availability(True)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton(device_type: str) -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed", "pip install triton (Linux only)")
    if _interpreting() or (device_type == "cuda" and torch.cuda.is_available()):
        return Availability(True)
    return Availability(
        False,
        "triton needs a CUDA device",
        "run on a machine with an NVIDIA GPU, or set TRITON_INTERPRET=1 to test on CPU",
    )
