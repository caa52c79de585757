"""Every technique sees the past of its own document and nothing else."""

from itertools import pairwise

import pytest
import torch
from techniques import TECHNIQUES

from pgolf.model import Model

BORDERS = [0, 5, 6, 14, 24]  # of documents in 24 tokens; one has a single token


def forms(model: Model):
    """The model as trained without and with its loops."""
    for looping in {False, model.config.num_loops > 0}:
        model.enter(looping=looping)
        yield model


@pytest.fixture(params=TECHNIQUES)
def technique(request):
    return TECHNIQUES[request.param]


def test_a_token_changes_nothing_before_it(technique, random_model):
    """Bit for bit, in rows and in packed documents."""
    torch.manual_seed(1)
    tokens = torch.randint(2, 64, (2, 12))
    cu_seqlens = torch.tensor([*BORDERS, 24, 24], dtype=torch.int32)
    for model in forms(random_model(torch.float32, **technique)):
        for at in (7, 18):  # of the flattened tokens: in the middle of a document, and of a row
            changed = tokens.clone()
            changed.view(-1)[at] = (changed.view(-1)[at] + 7) % 62 + 2
            next_row = at - at % 12 + 12
            with torch.inference_mode():
                before, after = model(tokens).view(24, -1), model(changed).view(24, -1)
                packed, repacked = (model(x, cu_seqlens, 10).view(24, -1) for x in (tokens, changed))
            assert torch.equal(before[:at], after[:at])
            assert torch.equal(before[next_row:], after[next_row:])
            assert not torch.equal(before[at], after[at])
            end = min(border for border in BORDERS if border > at)
            assert torch.equal(packed[:at], repacked[:at])
            assert torch.equal(packed[end:], repacked[end:])
            assert not torch.equal(packed[at], repacked[at])


def test_packed_documents_get_what_each_gets_alone(technique, random_model):
    tokens, targets = torch.randint(64, (2, 2, 12))
    flat, flat_targets = tokens.view(-1), targets.view(-1)
    cu_seqlens = torch.tensor([*BORDERS, 24, 24], dtype=torch.int32)
    for model in forms(random_model(**technique)):
        stretched = model.config.rope_scaling != "none"  # by the bound on the documents' lengths
        with torch.inference_mode():
            packed = model(tokens, cu_seqlens, 10).view(24, -1)
            losses = model.loss(tokens, targets, "none", cu_seqlens, 10)
            for start, end in pairwise(BORDERS):
                bound = (torch.tensor([0, end - start], dtype=torch.int32), 10) if stretched else ()
                alone = model(flat[None, start:end], *bound)[0]
                torch.testing.assert_close(packed[start:end], alone, rtol=1e-9, atol=1e-9)
                loss = model.loss(flat[None, start:end], flat_targets[None, start:end], "none", *bound)[0]
                torch.testing.assert_close(losses.view(-1)[start:end], loss, rtol=1e-5, atol=1e-5)
            without_bound = model(tokens, cu_seqlens).view(24, -1)
        assert stretched or torch.allclose(without_bound, packed, rtol=1e-9, atol=1e-9)


def test_every_parameter_gets_a_gradient(technique, random_model):
    model = random_model(**technique)
    tokens, targets = torch.randint(64, (2, 2, 9))
    model.weights_changed()
    assert model.caps_differ == model.config.asym_logit_rescale
    model.loss(tokens, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_compiles_once_a_form(random_model):
    """In rows and packed, with and without loops, in one graph each; coming back to a form compiles nothing."""
    shape = {"num_layers": 3, "num_loops": 1, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2}
    model = random_model(torch.float32, **{**TECHNIQUES["record"], **shape})
    tokens, targets = torch.randint(64, (2, 2, 12))
    cu_seqlens = torch.tensor([*BORDERS, 24], dtype=torch.int32)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=count)
    for looping in (False, True, False):
        model.enter(looping=looping)
        torch.testing.assert_close(compiled(tokens, targets), model.loss(tokens, targets))
        packed = compiled(tokens, targets, cu_seqlens=cu_seqlens, max_seqlen=10)
        torch.testing.assert_close(packed, model.loss(tokens, targets, cu_seqlens=cu_seqlens, max_seqlen=10))
        other = torch.tensor([0, 3, 9, 14, 24, 24], dtype=torch.int32)
        packed = compiled(tokens, targets, cu_seqlens=other, max_seqlen=10)
        torch.testing.assert_close(packed, model.loss(tokens, targets, cu_seqlens=other, max_seqlen=10))
    assert graphs == 4
