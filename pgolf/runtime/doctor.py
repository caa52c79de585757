"""`pgolf doctor`: what this machine has, what is wrong with it, and for each problem the command that mends it.

A "problem" stops something that pgolf is for on such a machine; a "note" only limits it. A machine without a GPU is
healthy.
"""

import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pgolf.runtime.checkout import rebuild_command
from pgolf.runtime.probes import PACKAGES, Facts, look
from pgolf.runtime.tried import interpreter_fails, release, untried

GIB = 2**30
SMALLEST_DISK = GIB  # a run's checkpoint, data and logs
WHEELS = "https://download.pytorch.org/whl"
WHAT_STOPS = {
    "sentencepiece": "text cannot be tokenised and no score in bits per byte can be counted",
    "zstandard": "`pgolf artifact compare` cannot be used",
    "brotli": "artifacts can be neither written nor read",
    "xz": "a run stops where it compares itself with xz",
    "tqdm": "no bar shows how far long work is",
    "matplotlib": "a run ends without its report",
    "jinja2": "a run ends without its report",
}


@dataclass(frozen=True)
class Problem:
    """One line for a person: `limits` says what is wrong and what that stops, `mend` is a command."""

    level: str  # "problem" or "note"
    section: str
    limits: str
    mend: str

    def __str__(self) -> str:
        return f"{self.level} ({self.section}): {self.limits}. Mend: {self.mend}"


def collect() -> dict[str, Any]:
    """The facts of every section, `problems` as a list of dicts, and `ok`: whether none of them stops anything."""
    found = look()
    problems = list(diagnose(found))
    return {
        **found,
        "problems": [asdict(problem) for problem in problems],
        "ok": all(problem.level != "problem" for problem in problems),
    }


def diagnose(found: dict[str, Facts]) -> Iterator[Problem]:
    """Every problem that the facts of `look` show."""
    if not found["packages"].get("torch") and "error" in found["native"]:
        limits = f"pgolf is not installed for {sys.executable}: nothing of it runs"
        yield Problem("problem", "python", limits, rebuild_command(tested=True))
        return  # the rest follows from it
    for judge in (_torch, _triton, _native, _operations, _gpu, _compilers, _packages, _untried, _machine, _data):
        yield from judge(found)
    for section in ("python", "gpu", "attention", "compilers", "packages", "codecs", "machine", "data"):
        if error := found[section].get("error"):
            limits = f"this section could not be looked at ({error}); the rest is not affected"
            yield Problem("note", section, limits, rebuild_command())


def _torch(found: dict[str, Facts]) -> Iterator[Problem]:
    torch, gpu = found["torch"], found["gpu"]
    if error := torch.get("error"):
        mend = f"pip install --force-reinstall 'torch>={PACKAGES['torch']}'"
        yield Problem("problem", "torch", f"PyTorch does not load ({error}): nothing of pgolf runs", mend)
        return
    if torch["cuda"] or not gpu.get("seen_by_driver"):
        return
    old = release(gpu["driver"]) < (580,)
    wheels = f"pip install --force-reinstall torch --index-url {WHEELS}/{'cu126' if old else 'cu130'}"
    if torch["build"] == "CPU":
        yield Problem("problem", "torch", "this PyTorch is a CPU build: the GPU here is not used", wheels)
        return
    limits = (
        f"PyTorch does not reach the GPU here ({torch['cuda_error'] or 'no reason given'}): training runs on the CPU"
    )
    if gpu.get("visible") is not None and not re.match(r"\s*(\d|GPU-|MIG-)", gpu["visible"]):
        mend = "unset CUDA_VISIBLE_DEVICES"
    elif old and release(torch["build"].split()[-1]) >= (13,):
        mend = wheels
    else:
        mend = "sudo modprobe nvidia_uvm"
    yield Problem("problem", "torch", limits, mend)


def _triton(found: dict[str, Facts]) -> Iterator[Problem]:
    if not found["python"].get("system", "Linux").startswith("Linux"):
        return
    triton, on_gpu = found["triton"], _has_gpu(found)
    mend = f"pip install 'triton>={PACKAGES['triton']}'"
    if error := triton.get("error"):
        stops = (
            "no Triton kernel runs, on a GPU everything falls back to slower code" if on_gpu else "its tests cannot run"
        )
        level = "problem" if on_gpu else "note"
        yield Problem(level, "triton", f"triton does not load ({error}): {stops}", mend)
        return
    if release(triton["version"]) < release(PACKAGES["triton"]):
        limits = f"triton {triton['version']} is older than {PACKAGES['triton']}: kernels may not compile"
        yield Problem("problem", "triton", limits, mend)
    elif on_gpu and release(triton["version"]) < (3, 6):
        limits = f"triton {triton['version']}: the MLP's gradient in float16 does not fit a Hopper GPU"
        yield Problem("note", "triton", limits, "pip install 'torch>=2.10' 'triton>=3.6'")
    numpy = found["packages"].get("numpy") or "0"
    if interpreter_fails(triton["version"], numpy):
        limits = (
            f"the interpreter of triton {triton['version']} fails with numpy {numpy}: kernels cannot be tested on a CPU"
        )
        yield Problem("note", "triton", limits, "pip install 'numpy<2.4'")
    if on_gpu and not found["compilers"].get("cc"):
        limits = "no C compiler (cc): Triton cannot build the launchers of its kernels"
        yield Problem("problem", "triton", limits, install_command("gcc", "gcc"))
    if on_gpu and not found["python"].get("headers", True):
        limits = "Python.h is missing: Triton cannot build the launchers of its kernels"
        yield Problem("problem", "triton", limits, install_command("python3-dev", "python3-devel"))


def _native(found: dict[str, Facts]) -> Iterator[Problem]:
    native = found["native"]
    if error := native.get("error"):
        mend = rebuild_command()
        if not _cpp_compiler(found):
            mend = f"{install_command('g++', 'gcc-c++')} && {mend}"
        limits = f"the compiled extension does not load ({error}): packing bits falls back to slow PyTorch code"
        yield Problem("problem", "native", limits, mend)
        return
    if not _has_gpu(found):
        return
    if not native["cuda"]:
        mend = f"PGOLF_CUDA=on {rebuild_command()}"
        if not found["compilers"].get("nvcc"):
            mend = f"{install_command('cuda-toolkit', 'cuda-toolkit')} && {mend}"  # from NVIDIA's own repository
        limits = f"the extension was built without CUDA ({native['cuda_reason']}): its GPU kernels are missing"
        yield Problem("note", "native", limits, mend)
        return
    archs = {re.sub(r"\D.*", "", arch): arch for arch in native["cuda_archs"]}
    for capability in sorted({device["capability"] for device in found["gpu"]["devices"]}):
        arch = capability.replace(".", "")
        if arch not in archs:
            limits = (
                f"the extension was compiled for {', '.join(archs.values())}, not for this GPU (compute {capability})"
            )
            yield Problem("note", "native", limits, f"PGOLF_CUDA_ARCHS={arch} {rebuild_command()}")


def _operations(found: dict[str, Facts]) -> Iterator[Problem]:
    operations = found["operations"]
    if found["torch"].get("error"):
        return  # said there
    if error := operations.get("error"):
        limits = f"pgolf.ops does not load ({error}): no operation can be called"
        yield Problem("problem", "operations", limits, rebuild_command())
        return
    forced = operations["forced"]
    lacking = [op for op, backends in operations["backends"].items() if not backends.get(forced, {"ok": False})["ok"]]
    if forced and lacking:
        limits = f"PGOLF_BACKEND={forced} forces a backend that these lack and will refuse to run: {', '.join(lacking)}"
        yield Problem("problem", "operations", limits, "unset PGOLF_BACKEND")


def _gpu(found: dict[str, Facts]) -> Iterator[Problem]:
    gpu = found["gpu"]
    if gpu.get("driver_error") and not gpu.get("devices"):
        limits = f"nvidia-smi does not reach the driver ({gpu['driver_error']}): a GPU here cannot be used"
        yield Problem("note", "gpu", limits, "sudo modprobe nvidia")


def _compilers(found: dict[str, Facts]) -> Iterator[Problem]:
    if not found["compilers"].get("error") and not _cpp_compiler(found) and not found["native"].get("error"):
        limits = "no C++ compiler: the extension works but cannot be built again"
        yield Problem("note", "compilers", limits, install_command("g++", "gcc-c++"))


def _packages(found: dict[str, Facts]) -> Iterator[Problem]:
    packages, codecs = found["packages"], found["codecs"]
    for name, oldest in PACKAGES.items():
        version = packages.get(name)
        if name == "triton" or (name == "torch" and found["torch"].get("error")) or "error" in packages:
            continue
        stops = WHAT_STOPS.get(name, "pgolf may fail anywhere")
        mend = f"pip install --upgrade '{name}>={oldest}'"
        if version is None and isinstance(codecs.get(name, {}), dict):  # a codec may come from elsewhere than pip
            yield Problem("problem", "packages", f"{name} is not installed: {stops}", mend)
        elif version is not None and release(version) < release(oldest):
            yield Problem("problem", "packages", f"{name} {version} is older than {oldest}: {stops}", mend)
    for name, version in codecs.items():
        missing = name in PACKAGES and packages.get(name) is None
        if isinstance(version, dict) and not missing:
            mend = f"pip install --force-reinstall '{name}>={PACKAGES[name]}'" if name in PACKAGES else _mend_xz()
            yield Problem("problem", "codecs", f"{name} does not load ({version['error']}): {WHAT_STOPS[name]}", mend)


def _untried(found: dict[str, Facts]) -> Iterator[Problem]:
    """Newer than what the tests ran with; what is older than it may be is a problem of its section."""
    versions = {
        "python": found["python"].get("version", ""),
        **{name: found[name].get("version", "") for name in ("torch", "triton")},
        "numpy": found["packages"].get("numpy") or "",
    }
    for name, version in versions.items():
        tried = untried(name, version)
        if tried and release(version) > release(tried):
            newest = tried.split()[-1]
            mend = f"python{newest} -m venv .venv" if name == "python" else f"pip install '{name}=={newest}.*'"
            section = "packages" if name == "numpy" else name
            yield Problem("note", section, f"{name} {version} was not tried, {tried} were; failures may be that", mend)


def _machine(found: dict[str, Facts]) -> Iterator[Problem]:
    machine = found["machine"]
    if "error" in machine:
        return
    if machine["disk_free_bytes"] < SMALLEST_DISK:
        limits = f"only {_gib(machine['disk_free_bytes'])} of disk free here: checkpoints and data may not fit"
        yield Problem("problem", "machine", limits, "pip cache purge && du -sh runs/* data/* | sort -h")
    if not machine["folder_writable"]:
        limits = "this folder is read-only: runs/ and data/ cannot be written here"
        yield Problem("problem", "machine", limits, "mkdir -p ~/pgolf && cd ~/pgolf")


def _data(found: dict[str, Facts]) -> Iterator[Problem]:
    data = found["data"]
    if "error" in data:
        return
    for dataset in data["datasets"]:
        for split in ("train", "val"):
            if not dataset[f"{split}_shards"]:
                stops = "no run can train on it" if split == "train" else "no run can use it"
                limits = f"{dataset['name']} has no {split} shards: {stops}"
                yield Problem("note", "data", limits, _data_command(data["folder"], dataset))
    if not any(dataset["variant"] for dataset in data["datasets"]):
        limits = (
            f"no FineWeb shards under {data['folder']}/: runs use the demo text, whose scores compare with nobody's"
        )
        yield Problem("note", "data", limits, "pgolf data download --variant sp1024")


def _data_command(folder: str, dataset: Facts) -> str:
    """Makes or fetches a dataset anew."""
    if dataset["variant"]:
        return f"pgolf data download --variant {dataset['variant']}"
    if dataset["name"].startswith("demo_"):
        return "pgolf data demo"
    path = shlex.quote(f"{folder}/datasets/{dataset['name']}")
    return f"mv {path} {path}.incomplete && pgolf data tokenize FILE... --out {path}"


def _has_gpu(found: dict[str, Facts]) -> bool:
    return bool(found["gpu"].get("devices"))


def _cpp_compiler(found: dict[str, Facts]) -> bool:
    return any(found["compilers"].get(name) is not None for name in ("c++", "g++", "clang++"))


def install_command(debian: str, fedora: str) -> str:
    """Installs a system package with this machine's own tool."""
    sudo = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "
    if sys.platform == "darwin":
        return "xcode-select --install"
    if shutil.which("dnf"):
        return f"{sudo}dnf install -y {fedora}"
    return f"{sudo}apt-get install -y {debian}"


def _mend_xz() -> str:
    # Only a Python that was built by hand, mostly by pyenv, can lack it.
    return f"{install_command('liblzma-dev', 'xz-devel')} && pyenv install --force {platform.python_version()}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """The report of `collect` as aligned lines, problems last, because a terminal shows the end."""
    lines = []
    for section, describe in DESCRIBE.items():
        facts = report[section]
        texts = [f"not available: {facts['error']}"] if "error" in facts else describe(facts)
        wrapped = [line for text in texts for line in textwrap.wrap(text, 105)]
        lines += [f"{'' if place else section:<13}{line}" for place, line in enumerate(wrapped)]
    problems = [Problem(**problem) for problem in report["problems"]]
    problems.sort(key=lambda problem: problem.level == "problem")
    lines += ["", *map(str, problems)] if problems else []
    return "\n".join([*lines, "", "Ready." if report["ok"] else "Not ready: see the problems above."])


def _describe_torch(facts: Facts) -> list[str]:
    reach = "reaches a GPU" if facts["cuda"] else "runs on the CPU"
    return [f"{facts['version']}, {facts['build']} build, {reach}"]


def _describe_triton(facts: Facts) -> list[str]:
    return [facts["version"] + (", interpreting (TRITON_INTERPRET is set)" if facts["interpreting"] else "")]


def _describe_native(facts: Facts) -> list[str]:
    cuda = f"CUDA {facts['cuda_version']} for {', '.join(facts['cuda_archs'])}" if facts["cuda"] else "no CUDA"
    reason = f" ({facts['cuda_reason']})" if facts["cuda_reason"] else ""
    return [
        f"{facts['version']}, {facts['compiler']}, {facts['build_type']}, {cuda}{reason}",
        f"CPU path {facts['cpu_level']}, of a CPU with {', '.join(facts['cpu_features']) or 'no extensions'}",
    ]


def _describe_operations(facts: Facts) -> list[str]:
    width = max(map(len, facts["backends"]), default=0)
    texts = [
        f"{op:<{width}}  {', '.join(name for name, answer in backends.items() if answer['ok'])}"
        for op, backends in facts["backends"].items()
    ]
    return texts + ([f"forced by PGOLF_BACKEND: {facts['forced']}"] if facts["forced"] else [])


def _describe_gpu(facts: Facts) -> list[str]:
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    devices = [
        f"{device['name']}, compute {device['capability']}, {_gib(device['memory_bytes'])}{driver}"
        for device in facts["devices"]
    ]
    return devices or [f"{name}{driver}, out of PyTorch's reach" for name in facts["seen_by_driver"]] or ["none"]


def _describe_codecs(facts: Facts) -> list[str]:
    return [
        ", ".join(f"{name} {'missing' if isinstance(found, dict) else found}".strip() for name, found in facts.items())
    ]


def _describe_machine(facts: Facts) -> list[str]:
    memory = f"{_gib(facts['memory_bytes'])} memory, {_gib(facts['memory_available_bytes'])} of it available"
    return [f"{facts['cores']} cores, {memory}, {_gib(facts['disk_free_bytes'])} disk free here"]


def _describe_data(facts: Facts) -> list[str]:
    return [
        f"{data['name']}: {data['train_shards']} train and {data['val_shards']} val shards, {data['tokens']:,} tokens"
        for data in facts["datasets"]
    ] or [f"no shards under {facts['folder']}/"]


def _describe_presence(facts: Facts) -> list[str]:
    there = [
        f"{name} {found}" if isinstance(found, str) else name
        for name, found in facts.items()
        if found not in (None, False)
    ]
    missing = [name for name, found in facts.items() if found in (None, False)]
    return [", ".join(there) or "none"] + ([f"not here: {', '.join(missing)}"] if missing else [])


DESCRIBE = {
    "python": lambda facts: [
        f"{facts['version']}, {facts['implementation']}, {facts['system']}"
        + (", in a virtual environment" if facts["virtual_environment"] else "")
    ],
    "torch": _describe_torch,
    "triton": _describe_triton,
    "native": _describe_native,
    "operations": _describe_operations,
    "gpu": _describe_gpu,
    "attention": _describe_presence,
    "compilers": _describe_presence,
    "packages": _describe_presence,
    "codecs": _describe_codecs,
    "machine": _describe_machine,
    "data": _describe_data,
}
