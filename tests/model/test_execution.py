"""The choice of how a model is computed; fused operations change nothing of what it computes."""

import pytest
import torch
from techniques import TECHNIQUES

from pgolf.model import Execution, choose_execution, execution
from pgolf.model.execution import FUSABLE

FUSED = (
    *("baseline", "multi_query", "output_gate", "query_gate", "value_embedding", "parallel", "yarn", "skip_gates"),
    *("two_lanes", "smear_gate", "bigram_hash"),
)


@pytest.mark.parametrize("technique", [*FUSED, "record"])
def test_fused_operations_change_nothing(technique, random_model):
    """Loss and all gradients, in float64, packed and with loops in rows; q, k and v apart and as one product."""
    model = random_model(**TECHNIQUES[technique])
    tokens, targets = torch.randint(64, (2, 2, 9))
    for looping in {False, model.config.num_loops > 0}:
        model.enter(looping=looping)
        documents = () if looping else (torch.tensor([0, 4, 5, 18, 18], dtype=torch.int32), 13)
        found = []
        for fused in (frozenset(), FUSABLE, FUSABLE - {"qkv_norm_rope"}):
            model.execute(Execution(torch.float64, fused=fused))
            loss = model.loss(tokens, targets, "mean", *documents)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            found.append((loss, grads))
        plain, *others = found
        for fused in others:
            torch.testing.assert_close(fused, plain)
    if technique == "record":
        model.execute(Execution(torch.float64, fused=FUSABLE))
        torch.compile(model.loss, fullgraph=True, backend="eager")(tokens, targets)


@pytest.mark.parametrize("operation", sorted(FUSABLE))
def test_each_may_be_fused_alone(operation, random_model):
    model = random_model(**TECHNIQUES["record"])
    tokens = torch.randint(64, (1, 9))
    plain = model(tokens)
    model.execute(Execution(torch.float64, fused=frozenset({operation})))
    torch.testing.assert_close(model(tokens), plain)


def test_the_choice_of_execution(monkeypatch):
    """On a GPU `auto` fuses what the table says was measured to win; nothing was yet."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def fused(setting, device):
        chosen = choose_execution(device, torch.float32, 64, attention="plain", fused_glue=setting)
        assert (chosen.dtype, chosen.attention) == (torch.float32, "plain")
        return chosen.fused

    assert fused("on", cpu) == FUSABLE
    assert fused("auto", cpu) == fused("auto", cuda) == fused("off", cuda) == set()
    monkeypatch.setitem(execution.WINS, (9, 0), frozenset({"xsa_gate"}))
    assert fused("auto", cuda) == {"xsa_gate"}
    assert fused("auto", cpu) == fused("off", cuda) == set()
    with pytest.raises(ValueError, match="fused: xsa is not accepted"):
        Execution(fused=frozenset({"xsa"}))


def test_bfloat16_is_close_to_float32(random_model):
    model = random_model(torch.float32)
    tokens = torch.randint(64, (4, 33))
    exact = float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach())
    model.execute(Execution(torch.bfloat16))
    assert abs(float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach()) - exact) < 0.02 * exact
