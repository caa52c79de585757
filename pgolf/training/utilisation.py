"""How well training uses a device: the FLOPs that a model needs a token, and their share of the device's peak (MFU).

A token takes 6 FLOPs a weight of each matrix that it is multiplied with, 2 forward and 4 backward, those of looped
layers each time, and the head's; and in each layer run, 12 · width for every token that attention looks back on, which
is half a row on average (PaLM, arXiv 2204.02311, appendix B, but for the causal half). Packed documents look back less
than the row's length says, so for them attention is counted at its most. Work element by element, the optimiser, and
what a backward pass computes again count nothing.
"""

import sys
from functools import lru_cache

import torch

from pgolf.model import ModelConfig

# Dense bfloat16 FLOP/s by data sheet, under the names that CUDA gives the SXM modules.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


@lru_cache
def flops_per_token(config: ModelConfig, looping: bool, length: int, passes: int = 3) -> int:
    """In rows of `length` tokens; `passes`: 3 forward and backward, 1 forward alone."""
    attention = 2 * config.model_dim * length * len(config.visits(looping))
    return passes * (2 * config.weights_met(looping) + attention)


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process so far: allocated on its GPU by torch, or resident on the host (0 where nobody knows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def performance(flops: float, seconds: float, steps: int, world_size: int, device: torch.device) -> dict[str, float]:
    """Fields of summary.json, for `steps` that took `flops` on all devices together. "mfu" where the peak is known."""
    rate = flops / max(seconds, 1e-9) / world_size
    found = {
        "step_ms": 1000 * seconds / max(steps, 1),
        "tflop_per_s": rate / 1e12,  # of one device
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found | {"mfu": rate / peak} if peak else found
