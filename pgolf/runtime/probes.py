"""What this machine has, as plain facts for `pgolf doctor`: a dict of JSON values a section, no judgement.

Every section is looked at on its own, so that a torch, triton or extension that does not load becomes a fact
(`{"error": ...}`) and hides nothing else. Nothing here imports more than it reports on.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgolf.runtime.host import cores, find_nvcc

Facts = dict[str, Any]
# Distributions that pgolf cannot do without, with the oldest version that will do.
PACKAGES = {
    "torch": "2.9",
    "triton": "3.5",  # on Linux
    "numpy": "1.26",
    "sentencepiece": "0.2",
    "zstandard": "0.23",
    "brotli": "1.2",
    "pydantic": "2.8",
    "tqdm": "4.66",
    "jinja2": "3.1",
    "matplotlib": "3.8",
}
COMPILERS = ("c++", "g++", "clang++", "cc", "nvcc", "cmake", "ninja")
DATA_FOLDER = Path("data")


def look() -> dict[str, Facts]:
    """The facts of every section, in the order in which they are shown."""
    return {name: _guarded(probe) for name, probe in PROBES.items()}


def _guarded(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:
        return {"error": one_line(error)}


def one_line(error: BaseException | str) -> str:
    """An exception in one line of at most 200 letters."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _python() -> Facts:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.machine()}",
        "virtual_environment": sys.prefix != sys.base_prefix,
        "headers": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    }


def _torch() -> Facts:
    torch = importlib.import_module("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    facts = {"version": str(torch.__version__), "build": build, "cuda": torch.cuda.is_available(), "cuda_error": ""}
    if torch.version.cuda and not facts["cuda"]:
        try:
            torch.cuda.init()
        except Exception as error:
            facts["cuda_error"] = one_line(error)
    return facts


def _triton() -> Facts:
    triton = importlib.import_module("triton")
    importlib.import_module("triton.language")
    return {"version": triton.__version__, "interpreting": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")}


def _native() -> Facts:
    return importlib.import_module("pgolf._native").build_info()


def _operations() -> Facts:
    """{"forced": PGOLF_BACKEND, "backends": {operation: {backend: {"ok", "reason", "mend"}}}}"""
    available = importlib.import_module("pgolf.ops").available()
    backends = {
        op: {name: {"ok": x.ok, "reason": x.reason, "mend": x.mend} for name, x in answers.items()}
        for op, answers in available.items()
    }
    return {"forced": os.environ.get("PGOLF_BACKEND", ""), "backends": backends}


def _gpu() -> Facts:
    """What torch finds and what the driver finds; both may be nothing."""
    facts: Facts = {"devices": [], "driver": "", "seen_by_driver": [], "driver_error": ""}
    facts["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi"):
        status, output = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        rows = [line.split(",") for line in output.splitlines() if line.count(",") == 1]
        if status == 0 and rows:
            facts["seen_by_driver"] = [name.strip() for name, _ in rows]
            facts["driver"] = rows[0][1].strip()
        else:
            facts["driver_error"] = one_line(output) or f"status {status}"
    try:
        cuda = importlib.import_module("torch").cuda
        for index in range(cuda.device_count() if cuda.is_available() else 0):
            device = cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": device.name,
                    "capability": f"{device.major}.{device.minor}",
                    "memory_bytes": device.total_memory,
                }
            )
    except Exception as error:  # reported under torch
        facts["devices_error"] = one_line(error)
    return facts


def _attention() -> Facts:
    """Which attentions could be imported, found by name, and which one a run would use."""
    return {
        "in use:": _attention_in_use(),
        "FlashAttention 3": importlib.util.find_spec("flash_attn_interface") is not None,
        "FlashAttention 4": _part_exists("flash_attn", "cute"),
        "torch.nn.attention.varlen": _part_exists("torch", "nn/attention/varlen.py"),
        "scaled_dot_product_attention": importlib.util.find_spec("torch") is not None,
    }


def _attention_in_use() -> str | None:
    try:
        torch, attention = importlib.import_module("torch"), importlib.import_module("pgolf.model.attention")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return attention.choose_attention("auto", device, torch.bfloat16, 1024)
    except Exception:  # reported under torch
        return None


def _part_exists(package: str, part: str) -> bool:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / part).exists() for folder in folders or [])


def _compilers() -> Facts:
    """{name: version, or "" for one that does not answer, or None}"""
    return {name: _version_of(name) for name in COMPILERS}


def _version_of(name: str) -> str | None:
    path = find_nvcc() if name == "nvcc" else shutil.which(name)
    if not path:
        return None
    output = _run(path, "--version")[1]
    match = re.search(r"release (\d+(?:\.\d+)+)", output) or re.search(r"(\d+(?:\.\d+)+)", output)
    return match[1] if match else ""


def _run(*command: str) -> tuple[int, str]:
    """Exit status and output of a command; -1 when it does not start or end within ten seconds."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, one_line(error)
    return done.returncode, done.stdout


def _packages() -> Facts:
    """{distribution: version or None}"""
    return {name: _installed(name) for name in PACKAGES}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _codecs() -> Facts:
    """{codec: version, or {"error": ...}}, each one really loaded."""

    def load(name: str) -> Any:
        try:
            module = importlib.import_module(name)
        except Exception as error:
            return {"error": one_line(error)}
        return getattr(module, "__version__", "")

    return {"brotli": load("brotli"), "zstandard": load("zstandard"), "xz": load("lzma")}


def _machine() -> Facts:
    total, free = _memory()
    return {
        "cores": cores(),
        "memory_bytes": total,
        "memory_available_bytes": free,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "folder_writable": os.access(".", os.W_OK),
    }


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory and of available memory; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
        kibibytes = {name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
        total, free = 1024 * kibibytes["MemTotal"], 1024 * kibibytes["MemAvailable"]
    except (OSError, KeyError):
        return None, None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (words := limit.read_text().strip()).isdigit():
        total, free = min(total, int(words)), min(free, int(words))
    return total, free


def _data() -> Facts:
    """The datasets under `data/` by counting files; `pgolf data inspect` reads them. `variant` is FineWeb's, or ""."""
    shards = importlib.import_module("pgolf.data.shards")
    known = importlib.import_module("pgolf.data.download").VARIANTS
    variants = {variant.dataset: name for name, variant in known.items()}
    datasets = []
    for folder in sorted((DATA_FOLDER / "datasets").glob("*")):
        found = {split: shards.find_shards(folder, split) for split in shards.SPLITS} if folder.is_dir() else {}
        if any(found.values()):
            sizes = [path.stat().st_size for paths in found.values() for path in paths]
            tokens = sum(max(0, size - shards.HEADER_BYTES) // shards.TOKEN_BYTES for size in sizes)
            dataset = {"name": folder.name, "train_shards": len(found["train"]), "val_shards": len(found["val"])}
            datasets.append(dataset | {"tokens": tokens, "bytes": sum(sizes), "variant": variants.get(folder.name, "")})
    return {"folder": str(DATA_FOLDER), "datasets": datasets}


PROBES: dict[str, Callable[[], Facts]] = {
    "python": _python,
    "torch": _torch,
    "triton": _triton,
    "native": _native,
    "operations": _operations,
    "gpu": _gpu,
    "attention": _attention,
    "compilers": _compilers,
    "packages": _packages,
    "codecs": _codecs,
    "machine": _machine,
    "data": _data,
}
