"""The model is what its formulas say, and one forward pass serves everything."""

import pytest
import torch
from plain_model import plain_logits
from techniques import TECHNIQUES

from pgolf.model import Model, ModelConfig, glue
from pgolf.model.glue import OPERATIONS, choose_fused_glue
from pgolf.settings import load_settings


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_any_number_of_layers_runs(layers, random_model):
    tokens = torch.randint(64, (2, 9))
    assert random_model(num_layers=layers)(tokens).shape == (2, 9, 64)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_is_what_the_formulas_say(technique, random_model):
    """In float64; 1 is the token that begins documents."""
    model = random_model(**TECHNIQUES[technique])
    tokens = torch.tensor([3, 5, 60, 1, 7, 7, 33])
    for looping in {False, model.config.num_loops > 0}:
        model.looping = looping
        torch.testing.assert_close(model(tokens[None])[0], plain_logits(model, tokens), rtol=1e-5, atol=1e-5)


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
        model.looping = looping
        documents = () if looping else (torch.tensor([0, 4, 5, 18, 18], dtype=torch.int32), 13)
        found = []
        for model.fused in (frozenset(), OPERATIONS, OPERATIONS - {"qkv_norm_rope"}):
            loss = model.loss(tokens, targets, "mean", *documents)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            found.append((loss, grads))
        plain, *others = found
        for fused in others:
            torch.testing.assert_close(fused, plain)
    model.fused = OPERATIONS
    if technique == "record":
        torch.compile(model.loss, fullgraph=True, backend="eager")(tokens, targets)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_each_may_be_fused_alone(operation, random_model):
    model = random_model(**TECHNIQUES["record"])
    tokens = torch.randint(64, (1, 9))
    plain = model(tokens)
    model.fused = frozenset({operation})
    torch.testing.assert_close(model(tokens), plain)


@pytest.mark.parametrize("lane", ["attn", "mlp"])
def test_lanes_that_part_at_once_and_merge_into_one_fused(lane, random_model):
    """With four layers the first of the second half takes back at once what was stored last."""
    model = random_model(num_layers=4, parallel_start_layer=2, parallel_final_lane=lane)
    tokens = torch.randint(64, (1, 9))
    plain = model(tokens)
    model.fused = OPERATIONS
    torch.testing.assert_close(model(tokens), plain)


def test_the_choice_of_fused_operations(monkeypatch):
    """On a GPU `auto` follows the table of what was measured to win; nothing was yet."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_fused_glue("on", cpu) == OPERATIONS
    assert choose_fused_glue("auto", cpu) == choose_fused_glue("auto", cuda) == choose_fused_glue("off", cuda) == set()
    monkeypatch.setitem(glue.WINS, (9, 0), frozenset({"xsa_gate"}))
    assert choose_fused_glue("auto", cuda) == {"xsa_gate"}
    assert choose_fused_glue("auto", cpu) == choose_fused_glue("off", cuda) == set()


@pytest.mark.parametrize("lane", ["attn", "mlp"])
def test_either_lane_may_be_the_last(lane, random_model):
    model = random_model(parallel_start_layer=3, parallel_final_lane=lane)
    tokens = torch.tensor([3, 5, 60, 1, 7])
    torch.testing.assert_close(model(tokens[None])[0], plain_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_two_lanes_begin_in_the_second_half_at_the_earliest(small_config):
    for layers, start, first in ((6, 1, 3), (6, 4, 4), (3, 1, 1), (2, 1, 1)):
        config = small_config(num_layers=layers, parallel_start_layer=start)
        assert [visit.layer for visit in config.visits(False) if config.two_lanes(visit)] == list(range(first, layers))


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


def test_layers_run_in_the_records_order(small_config):
    """#2135's log: encoder 0 1 2 3 4 5 3 4, decoder 5 3 4 5 6 7 8 9 10."""
    config = ModelConfig.of(load_settings({"PRESET": "record"}))
    visits = config.visits(looping=True)
    assert [visit.layer for visit in visits] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [visit.stores for visit in visits] == [True] * 8 + [False] * 9
    assert [visit.skip for visit in visits] == [None] * 8 + list(range(8)) + [None]
    assert [visit.layer for visit in config.visits(looping=False)] == list(range(11))
    assert sum(visit.skip is not None for visit in config.visits(looping=False)) == 5
    assert len(ModelConfig.of(load_settings({"PRESET": "recurrent8"})).visits(looping=True)) == 29
    # 35.9 and 53.2 million weights met a token, of which the records' utilisation is reckoned
    assert [round(config.weights_met(looping) / 1e6, 1) for looping in (False, True)] == [35.9, 53.2]


def test_banks_are_fake_quantised_once_a_pass_and_gradients_go_through(random_model):
    model = random_model(num_loops=1, loop_start=1, loop_end=2)
    tokens, targets = torch.randint(64, (2, 2, 9))
    seen = []

    def halve(name, bank):
        seen.append(name)
        return bank / 2

    model.fake_quantize = halve
    model.loss(tokens, targets).backward()
    assert sorted(seen) == ["down_bank", "kv_bank", "qo_bank", "up_bank"]
    through = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.fake_quantize = None
    with torch.no_grad():
        for name in seen:
            getattr(model, name).div_(2)
    model.loss(tokens, targets).backward()
    for name in seen:
        torch.testing.assert_close(2 * through[name], getattr(model, name).grad, rtol=1e-5, atol=1e-7)


def test_caps_of_either_sign(random_model):
    """Equal ones make no difference to the loss; others cap each sign at its own height."""
    model = random_model(torch.float32, asym_logit_rescale=True)
    tokens, targets = torch.randint(64, (2, 2, 9))
    with torch.no_grad():
        model.softcaps.fill_(model.config.logit_softcap)
        same, capped = model.loss(tokens, targets, "none"), model.capped(model(tokens))
        model.caps_differ = True
        torch.testing.assert_close(model.loss(tokens, targets, "none"), same)
        torch.testing.assert_close(model.capped(model(tokens)), capped)
        model.softcaps.copy_(torch.tensor([2.0, 0.5]))
        z = model(tokens)
        capped = torch.where(z > 0, 2.0 * torch.tanh(z / 2.0), 0.5 * torch.tanh(z / 0.5))
        expected = -capped.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(model.loss(tokens, targets, "none"), expected)
        torch.testing.assert_close(model.loss(tokens, targets), expected.mean())


def test_an_untrained_model_knows_nothing(small_config):
    """Zero output projections and a small embedding: the loss is that of a uniform guess."""
    model = Model(small_config(tied_embed_init_std=0.005)).initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(64, (4, 33))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:]).detach()
    assert abs(float(loss) - torch.tensor(64.0).log()) < 0.05


def test_observer_sees_the_input_of_every_matrix_and_changes_nothing(random_model):
    model = random_model()
    tokens = torch.randint(64, (2, 6))
    seen: dict[tuple[str, int], torch.Tensor] = {}
    logits = model(tokens, observe=lambda name, index, x: seen.__setitem__((name, index), x.detach()))
    assert torch.equal(logits, model(tokens))
    banks = {name: p for name, p in model.named_parameters() if name.endswith("_bank")}
    assert seen.keys() == {(n, i) for n, bank in banks.items() for i in range(len(bank))} | {("embedding", 0)}
    for (name, _), x in seen.items():
        assert x.size(-1) == getattr(model, name).size(-1)
    torch.testing.assert_close(seen["embedding", 0] @ model.embedding.T, logits)


def test_bfloat16_is_close_to_float32(random_model):
    model = random_model(torch.float32)
    tokens = torch.randint(64, (4, 33))
    exact = float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach())
    model.dtype = torch.bfloat16
    assert abs(float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach()) - exact) < 0.02 * exact
