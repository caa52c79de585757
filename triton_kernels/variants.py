"""What a kernel module tells about itself, so that it can be compiled and priced on a machine without a GPU.

Each kernel module has a list `VARIANTS`: the configurations that it ships, at shapes of the record. Tests compile every
one of them ahead of time and refuse spills; the static report prints registers, bytes and FLOPs from the same list.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration at one shape."""

    name: str  # operation, dtypes and shape, for tables
    kernel: Any  # the function made by triton.jit
    signature: dict[str, str]  # every argument -> "*bf16", "i32", ..., "constexpr", in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    programs: int  # size of the grid
    bytes_moved: int  # to and from device memory, each byte once
    flops: int
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16 at this shape: pointers, sizes
    debug: bool = False  # device assertions are compiled in
    registers: int | None = None  # of a thread at most; None: as the compiler likes


def signature(kernel: Any, constexprs: dict[str, Any], **types: str) -> dict[str, str]:
    """Types of a kernel's arguments: those named, else bfloat16 for pointers and int32 for numbers."""
    return {
        name: "constexpr" if name in constexprs else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }


@lru_cache
def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 on a CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def programs(device: torch.device, blocks: int, per_multiprocessor: int) -> int:
    """Size of the grid of a kernel whose programs go over many blocks each."""
    if device.type != "cuda":
        return min(blocks, 2)  # the interpreter: a few, so that each has several
    return min(blocks, per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count)
