"""What a run says of its device."""

import sys
from pathlib import Path

import pytest
import torch

from pgolf.runtime.utilisation import peak_memory_bytes, performance

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True),
                                             ("NVIDIA H100 PCIe", False), ("Radeon", False)])  # fmt: skip
def test_utilisation_is_told_where_the_peak_is_known(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    found = performance(flops=989e12 * 8, seconds=4.0, steps=20, world_size=8, device=GPU)
    assert found.pop("mfu", None) == (pytest.approx(0.25) if known else None)
    assert found == {"step_ms": 200.0, "tflop_per_s": pytest.approx(989 / 4), "peak_memory_bytes": 12345}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_process_is_what_the_system_says():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    assert peak_memory_bytes(CPU) == pytest.approx(1024 * kilobytes, rel=0.05)  # the kernel counts pages in batches
