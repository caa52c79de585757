"""Compile Triton kernels for a GPU that is not there, and read from the machine code what they need.

`variants()` finds every shipped configuration (`VARIANTS` of the modules in pgolf.triton_kernels), `compile_variant`
gives its registers, spills, shared memory and the use of tensor cores (wgmma) and the copy engine (TMA). The
disassembler comes with the triton wheel. Works with no GPU and no driver; not under TRITON_INTERPRET=1.
"""

import importlib
import inspect
import pkgutil
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import pgolf.triton_kernels
from bench.kernels.hopper import WARPS_PER_SM, blocks_per_sm
from pgolf.triton_kernels.variants import Variant

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes, from its machine code."""

    registers: int  # a thread
    stack_bytes: int  # a thread
    shared_bytes: int  # a block
    spill_instructions: int  # stores to and loads from local memory
    wgmma_instructions: int
    tma_instructions: int
    wide_store_instructions: int  # global stores of 16 bytes a thread
    blocks_per_sm: int
    occupancy: float  # resident warps / 64
    waiting: str = ""  # ptxas's words where it makes a wgmma wait: (C7515) all are serialised, (C7517) a wait is put in


def variants() -> list[Variant]:
    """Every configuration of every kernel that the package ships."""
    found: list[Variant] = []
    for module in sorted(pkgutil.iter_modules(pgolf.triton_kernels.__path__), key=lambda module: module.name):
        found += getattr(importlib.import_module(f"pgolf.triton_kernels.{module.name}"), "VARIANTS", [])
    return found


def compile_variant(variant: Variant, architecture: int = 90) -> Resources:
    """Compile for `architecture` (90 is sm_90) and read the result."""
    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    names = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    options |= {"debug": variant.debug, "sanitize_overflow": False}
    if variant.registers:
        options["maxnreg"] = variant.registers
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    found = read_cubin(compiled.asm["cubin"], variant.num_warps, compiled.metadata.shared)
    return replace(found, waiting=waiting_wgmma(compiled.asm["ptx"], architecture))


def read_cubin(cubin: bytes, num_warps: int, shared_bytes: int) -> Resources:
    """Read a cubin with one kernel; `shared_bytes` is what its launch asks for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        assembly = _cuobjdump("-sass", path)
    registers = _usage("REG", usage)
    blocks = blocks_per_sm(registers, num_warps, shared_bytes)
    return Resources(
        registers=registers,
        stack_bytes=_usage("STACK", usage),
        shared_bytes=shared_bytes,
        spill_instructions=_instructions(r"STL|LDL", assembly),
        wgmma_instructions=_instructions(r"HGMMA|QGMMA|IGMMA", assembly),
        tma_instructions=_instructions(r"UTMALDG|UTMASTG", assembly),
        wide_store_instructions=_instructions(r"STG(\.\w+)*\.128", assembly),
        blocks_per_sm=blocks,
        occupancy=blocks * num_warps / WARPS_PER_SM,
    )


def waiting_wgmma(ptx: str, architecture: int = 90) -> str:
    """What ptxas says of a wgmma that it makes wait, or "". Triton drops what ptxas says: it is run again here."""
    if "wgmma" not in ptx:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_ptxas(architecture), "-v", "-lineinfo", f"--gpu-name=sm_{architecture}a"]
        command += [str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr
    return "; ".join(line.partition(": ")[2].strip() for line in log.splitlines() if re.search(r"\(C75\d\d\)", line))


def local_memory(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of local memory a thread, instructions that use it): what `read_cubin` says of them.

    A tenth of the time where no local memory is used, for then nothing is disassembled.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        stack = _usage("STACK", usage)
        used = _instructions(r"STL|LDL", _cuobjdump("-sass", path)) if stack else 0
    return _usage("REG", usage), stack, used


def _ptxas(architecture: int) -> str:
    """The assembler that Triton takes; Triton 3.5 has one for all GPUs."""
    known = len(inspect.signature(get_ptxas).parameters)
    return str(get_ptxas(*(architecture,)[:known]).path)


def _cuobjdump(option: str, path: Path) -> str:
    command = [str(CUOBJDUMP), option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _usage(name: str, text: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no {name}: {text!r}")
    return int(found.group(1))


def _instructions(pattern: str, assembly: str) -> int:
    """Instructions whose name matches; a line is "/*0010*/  @P0 NAME.SUFFIX operands"."""
    return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?:{pattern})\b", assembly, re.MULTILINE))
