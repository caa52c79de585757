"""With equal weights, logits and loss are those of the entries' own scripts, which PGOLF_PEERS has to lead to.

PGOLF_PARITY=full compares at the presets' whole width and depth too.
"""

import os

import pytest
import torch

from bench import peers
from pgolf.artifact.import_checkpoint import convert
from pgolf.model import Model, ModelConfig
from pgolf.settings import load_settings

SMALL = {"MODEL_DIM": "64", "VOCAB_SIZE": "256", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}
SYSTEMS = ["baseline", "pr1493", "pr1855"]
WIDTHS = ["small", "full"] if os.environ.get("PGOLF_PARITY") == "full" else ["small"]


def pair(system: str, width: str):
    """(theirs, ours), with the same random weights in float32."""
    settings = load_settings({"PRESET": system, **(SMALL if width == "small" else {})})
    if system == "pr1493" and width == "small":
        settings = settings.model_copy(update={"train_seq_len": 32, "rope_train_seq_len": 32})  # rows below are longer
    theirs = getattr(peers.peer("parameter_golf_models"), system)(settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            spread = 0.02 if width == "full" and parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    ours = Model(ModelConfig.of(settings))
    ours.load_state_dict(convert(theirs.state_dict(), ours.config))
    return theirs, ours


def compare(theirs, ours, tokens, targets, **documents):
    with torch.inference_mode():
        expected = theirs(tokens, targets, **documents)
        logits = ours.capped(ours(tokens, **documents))
        torch.testing.assert_close(logits, theirs.forward_logits(tokens, **documents), rtol=0, atol=1e-4)
        loss = ours.loss(tokens, targets, **documents)
        torch.testing.assert_close(loss, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_logits_and_loss_are_the_originals(system, width):
    theirs, ours = pair(system, width)
    tokens, targets = torch.randint(ours.config.vocab_size, (2, 2, 48))
    tokens[:, 20] = ours.config.bos_id  # #1855's SmearGate looks for it
    for looping in {False, ours.config.num_loops > 0}:
        theirs.looping_active = looping
        ours.enter(looping=looping)
        compare(theirs, ours, tokens, targets)


@pytest.mark.parametrize("width", WIDTHS)
def test_packed_documents_are_the_originals(width):
    theirs, ours = pair("pr1855", width)
    theirs.looping_active = True
    borders = [0, 7, 30, 31, 48, 96]
    tokens, targets = torch.randint(2, ours.config.vocab_size, (2, 1, 96))
    tokens[0, borders[:-1]] = ours.config.bos_id
    cu_seqlens = torch.tensor([*borders, 96, 96], dtype=torch.int32)
    compare(theirs, ours, tokens, targets, cu_seqlens=cu_seqlens, max_seqlen=48)
