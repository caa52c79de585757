"""FLOPs a token, as torch counts them in a step of the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pgolf import ops
from pgolf.model import Execution, Model, ModelConfig
from pgolf.model.flops import flops_per_token
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp_reference
from pgolf.settings import load_settings

SMALL = {"MODEL_DIM": "64", "VOCAB_SIZE": "96", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}


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
    model = Model(config, Execution(attention="plain")).initialise(torch.Generator().manual_seed(0))
    rows, length = 2, 24
    tokens, targets = torch.randint(config.vocab_size, (2, rows, length))
    for looping in {False, config.num_loops > 0}:
        model.enter(looping=looping)
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
