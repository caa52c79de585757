"""What to compute with on this machine."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from pgolf.ops.backends import native


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU and on CPUs whose bfloat16 arithmetic torch may use, else float32."""
    if asked != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]
    if device.type == "cuda":
        return torch.bfloat16
    # Held below AVX-512 by ATEN_CPU_CAPABILITY, torch's attention in bfloat16 fails on a CPU that has more.
    allowed = torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "DEFAULT", "AVX2")
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = allowed and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


class SideStream:
    """Work beside the current CUDA stream; on a CPU there is one stream, and it is simply done."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside begins when what was launched so far has ended."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What is launched from now on waits for what was launched beside. The host does not."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def cpu_name() -> str:
    """Model and number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"


def cpu_levels() -> dict[str, str]:
    """Which instructions torch's kernels and ours use on this CPU."""
    found = {"torch": torch.backends.cpu.get_cpu_capability(), "pgolf": "none"}
    with contextlib.suppress(ImportError):
        found["pgolf"] = native().level()
    return found


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks instead of returning them to the system (glibc; no effect elsewhere).

    Activations of a CPU step are such blocks: without it each is mapped and zeroed anew, 15 to 20% of the demo's step.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold = -1, -3  # names and numbers of malloc.h
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def allow_compilations(count: int) -> None:
    """Of one function; the compiler's own limit is an error in a function that must be one graph."""
    import torch._dynamo.config as config

    config.recompile_limit = max(count, config.recompile_limit)
