"""CUDA_GRAPHS: forward and backward are captured once and replayed, each with one launch (torch.compile's own graphs).

A replay reads weights where they lie, which therefore change in place alone, and copies the batch to where the captured
kernels read it. What it returns, loss and gradients, lies in the graph's memory until the next replay takes that again:
`begin` goes before each forward pass, a loss is copied or used before the next one, gradients are dropped at the end of
a step, and a step of several micro-batches keeps its sum of gradients outside (`keep_gradients`). Every phase and shape
is a graph of its own; all share their memory. A pass is captured when it is called for the second time.
"""

import sys
from collections.abc import Iterable

import torch
from torch import nn

from pgolf.errors import UserError

WARMUP_STEPS = 3  # at least: one as compiled, one captured, one replayed
# Compute capabilities where a run with graphs was measured to be faster. None has been measured, so `auto` is off.
WINS: frozenset[tuple[int, int]] = frozenset()


def choose_cuda_graphs(setting: str, device: torch.device, compiled: bool) -> bool:
    """Whether to capture; `setting` is auto, on or off. `UserError` where it cannot be on."""
    if setting == "on":
        if device.type != "cuda":
            raise UserError(f"CUDA_GRAPHS=on: needs a CUDA device, this is {device.type}; accepted here: auto, off")
        if not compiled:
            raise UserError("CUDA_GRAPHS=on: what the compiler makes is captured, and COMPILE=off; accepted: auto, off")
        return True
    return setting == "auto" and compiled and device.type == "cuda" and torch.cuda.get_device_capability(device) in WINS


def begin() -> None:
    """Before each forward pass: whatever earlier ones returned is done with."""
    torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copy gradients out of the graph's memory; backward passes after it add to the copies."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def skipped() -> int:
    """Passes that the compiler was asked to capture in this process and did not; TORCH_LOGS=perf_hints tells why."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["inductor"]["cudagraph_skips"]) if dynamo else 0
