"""What an untrained model is."""

import pytest
import torch
from techniques import TECHNIQUES

from pgolf.model import Model


def test_a_technique_that_is_off_has_no_parameters(small_config):
    plain = {
        "embedding",
        "qo_bank",
        "kv_bank",
        "up_bank",
        "down_bank",
        "q_gain",
        "attn_scale",
        "mlp_scale",
        "resid_mix",
    }
    assert small_config(unet_skips=False).shapes().keys() == plain
    assert small_config().shapes().keys() == plain | {"skip_weights"}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_new_techniques_begin_where_they_do_nothing(technique, small_config):
    """But for the sparse gate, which begins at one half, and XSA and norm scale, which have nothing to learn."""
    config = small_config(**TECHNIQUES[technique])
    begins = {
        name: p.detach() for name, p in Model(config).initialise(torch.Generator().manual_seed(0)).named_parameters()
    }
    zeros = {"attn_gate", "smear_gate", "smear_lambda", "skip_gates", "bigram_projection", "value_projection"}
    for name in zeros & begins.keys():
        assert not begins[name].any(), name
    for name in {"skip_weights", "parallel_post_lambdas", "value_layer_scales"} & begins.keys():
        assert (begins[name] == 1).all(), name


def test_an_untrained_model_knows_nothing(small_config):
    """Zero output projections and a small embedding: the loss is that of a uniform guess."""
    model = Model(small_config(tied_embed_init_std=0.005)).initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(64, (4, 33))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:]).detach()
    assert abs(float(loss) - torch.tensor(64.0).log()) < 0.05
