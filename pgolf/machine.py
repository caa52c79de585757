"""What to compute with on this machine."""

import torch


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU and on CPUs with bfloat16 arithmetic, else float32."""
    if asked != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = device.type == "cuda" or any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32
