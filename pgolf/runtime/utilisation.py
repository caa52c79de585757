"""How well training uses a device: time, memory, and the share of the device's peak FLOP/s (MFU)."""

import sys

import torch

# Dense bfloat16 FLOP/s by data sheet, under the names that CUDA gives the SXM modules.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


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
