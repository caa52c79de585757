"""FLOPs a token, as torch counts them in a step of the model, and what a run says of its device."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp_reference
from pgolf.settings import load_settings
from pgolf.training.utilisation import flops_per_token, peak_memory_bytes, performance

SMALL = {"MODEL_DIM": "64", "VOCAB_SIZE": "96", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("baseline", {}),
        ("pr1855", {"LOADER": "shuffled"}),
        ("dense4096", {"NUM_LAYERS": "3", "VE_LAYERS": "0,2", "BIGRAM_VOCAB_SIZE": "32", "ATTN_OUT_GATE_ENABLED": "1"}),
    ],
)
def test_the_formula_is_what_torch_counts(preset, changes, monkeypatch):
    """torch's counter does not look into operations of ours, and takes attention's products for whole squares."""
    monkeypatch.setattr(ops, "leaky_relu2_mlp", leaky_relu2_mlp_reference)
    config = ModelConfig.of(load_settings({"PRESET": preset, **SMALL, **changes}))
    model = Model(config).initialise(torch.Generator().manual_seed(0))
    model.attention = "plain"
    rows, length = 2, 24
    tokens, targets = torch.randint(config.vocab_size, (2, rows, length))
    for looping in {False, config.num_loops > 0}:
        model.looping = looping
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens, targets).backward()
        ours, products = (flops_per_token(config, looping, n) for n in (length, 0))
        assert counter.get_total_flops() == rows * length * (ours + (ours - products))
        assert ours == 3 * flops_per_token(config, looping, length, passes=1)


def test_the_records_flops():
    """Of #2135: 35.9 and 53.2 million weights met a token, and attention over rows of 2,048."""
    config = ModelConfig.of(load_settings({"PRESET": "record"}))
    assert flops_per_token(config, False, 2048) == pytest.approx(6 * 35.9e6 + 6 * 512 * 2048 * 11, rel=1e-3)
    assert flops_per_token(config, True, 2048) == pytest.approx(6 * 53.2e6 + 6 * 512 * 2048 * 17, rel=1e-3)


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
