"""The machine that measurements belong to: its name, its versions, and the ceilings that it reaches itself."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from pgolf.runtime.host import cores

PACKAGES = ("pgolf", "torch", "triton", "numpy", "pytest-benchmark")


def describe() -> dict[str, Any]:
    """{"name", "slug", "kind" (cuda or cpu), "detail", "cores", "versions"}; works without torch, then for the CPU."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    try:
        import torch

        cuda = torch.cuda.is_available()
    except ImportError:
        cuda = False
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        name, kind = properties.name, "cuda"
        detail = (
            f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 1e9:.0f} GB"
        )
        versions["cuda"] = torch.version.cuda
    else:
        name, detail = _cpu()
        name, kind = f"{name}, {cores()} cores", "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return {"name": name, "slug": slug, "kind": kind, "detail": detail, "cores": cores(), "versions": versions}


def measure_ceilings(seconds_per_call: Callable[..., float], kind: str, quick: bool) -> dict[str, float]:
    """What this device reaches at best: {"copy_gb_per_s": read + write, "float32_tflop_per_s", "bfloat16_tflop_per_s"}.

    `seconds_per_call(function, *arguments)` times one call. Every figure is the best of several, because a ceiling must
    not be lowered by a busy neighbour. float32 products run as training lets them (TF32 on CUDA).
    """
    import torch

    torch.set_float32_matmul_precision("high")
    rounds = 3 if quick else 15
    size = (1 << 28) if kind == "cuda" else (1 << 25)  # float32 values: larger than any cache
    source, target = torch.rand(size, device=kind), torch.rand(size, device=kind)
    ceilings = {"copy_gb_per_s": 8 * size / 1e9 / _best(lambda: seconds_per_call(target.copy_, source), rounds)}
    n = 8192 if kind == "cuda" else 1024 if quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n, device=kind).to(dtype), torch.randn(n, n, device=kind).to(dtype)
        seconds = _best(lambda a=a, b=b: seconds_per_call(torch.mm, a, b), rounds)
        ceilings[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] = 2 * n**3 / seconds / 1e12
    return ceilings


def _best(timed: Callable[[], float], rounds: int) -> float:
    for _ in range(2):
        timed()
    return min(timed() for _ in range(rounds))


class Neighbours:
    """What other processes take of the CPUs while this one measures."""

    def __init__(self):
        self._start = self._seconds()

    def share(self) -> float | None:
        """Their part of all CPU time since the start, 0 to 1; None where the system does not tell."""
        if self._start is None:
            return None
        busy, everything, own = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return round(max(0.0, busy - own) / max(everything, 1e-9), 3)

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """CPU seconds of the machine that were used, all of them, and those of this process and its children."""
        if sys.platform != "linux":
            return None
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        hertz, idle = os.sysconf("SC_CLK_TCK"), ticks[3] + ticks[4]
        return (sum(ticks) - idle) / hertz, sum(ticks) / hertz, sum(os.times()[:4])


def today() -> str:
    return time.strftime("%Y-%m-%d")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> tuple[str, str]:
    """(model name, what tells its generation)."""
    if sys.platform != "linux":
        return platform.processor() or platform.machine(), platform.platform(terse=True)
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    detail = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return fields.get("model name", platform.machine()), detail
