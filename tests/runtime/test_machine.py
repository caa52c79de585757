"""What a run computes with on this machine."""

import pytest
import torch

from pgolf.runtime.machine import compute_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "chosen"),
    [
        ("AVX512", True, torch.bfloat16),
        ("AVX512", False, torch.float32),
        ("AVX2", True, torch.float32),  # torch is held below what the CPU has
        ("DEFAULT", True, torch.float32),
    ],
)
def test_bfloat16_needs_a_cpu_that_has_it_and_torch_that_may_use_it(monkeypatch, capability, has_bfloat16, chosen):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: has_bfloat16, raising=False)
    assert compute_dtype("auto", CPU) == chosen
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float32", CPU) == torch.float32


def test_a_gpu_computes_in_bfloat16_whatever_its_host_has(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
