"""The model: published size, causality, skips, and one forward pass for everything."""

import pytest
import torch

from pgolf.model import Model, ModelConfig, norm, rotate
from pgolf.settings import load_settings


def small(**changes) -> ModelConfig:
    values = {
        "vocab_size": 64,
        "num_layers": 3,
        "model_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_mult": 2.0,
        "mlp_slope": 0.5,
        "rope_base": 10_000.0,
        "logit_softcap": 30.0,
        "qk_gain_init": 1.5,
        "tied_embed_init_std": 0.5,
    }
    return ModelConfig(**{**values, **changes})


def random_model(dtype=torch.float64, **changes) -> Model:
    """Every parameter random, zero-initialised ones too, so that no path is dead."""
    generator = torch.Generator().manual_seed(0)
    model = Model(small(**changes), dtype).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.double() if dtype == torch.float64 else model


def test_baseline_has_the_published_parameter_count():
    config = ModelConfig.of(load_settings({"PRESET": "baseline"}))
    assert config.parameters() == 17_059_912
    assert sum(p.numel() for p in Model(config).parameters()) == 17_059_912


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_logits_depend_on_the_past_only(layers):
    model = random_model(num_layers=layers)
    tokens = torch.randint(64, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(64, (2, 5))
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_matches_a_plain_statement_of_the_architecture():
    """Layer by layer with loops over heads and an explicit mask, in float64."""
    model = random_model(num_layers=3)
    config, (rows, length) = model.config, (2, 10)
    tokens = torch.randint(64, (rows, length))
    rotary = model._rotary_tables(length, tokens.device)
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    x = x0 = norm(model.embedding[tokens])
    first_half: list[torch.Tensor] = []
    for layer in range(3):
        if layer == 1:
            x = x + model.skip_weights[0] * first_half.pop()
        x = model.resid_mix[layer, 0] * x + model.resid_mix[layer, 1] * x0
        h, heads = norm(x), []
        for head in range(config.num_heads):
            d = config.head_dim
            group = head // (config.num_heads // config.num_kv_heads)
            q = norm(h @ model.qo_bank[layer][head * d : (head + 1) * d].T)
            k = norm(h @ model.kv_bank[layer][group * d : (group + 1) * d].T)
            v = h @ model.kv_bank[3 + layer][group * d : (group + 1) * d].T
            q = rotate(q.unsqueeze(2), rotary).squeeze(2) * model.q_gain[layer, head]
            k = rotate(k.unsqueeze(2), rotary).squeeze(2)
            heads.append((q @ k.mT / d**0.5 + mask).softmax(-1) @ v)
        x = x + model.attn_scale[layer] * (torch.cat(heads, -1) @ model.qo_bank[3 + layer].T)
        z = norm(x) @ model.up_bank[layer].T
        x = x + model.mlp_scale[layer] * (torch.where(z > 0, z, 0.5 * z) ** 2 @ model.down_bank[layer].T)
        if layer == 0:
            first_half.append(x)
    torch.testing.assert_close(model(tokens), norm(x) @ model.embedding.T, rtol=1e-9, atol=1e-9)


def test_every_parameter_gets_a_gradient():
    model = random_model()
    tokens = torch.randint(64, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_an_untrained_model_knows_nothing():
    """Zero output projections and a small embedding: the loss is that of a uniform guess."""
    model = Model(small(tied_embed_init_std=0.005)).initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(64, (4, 33))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:]).detach()
    assert abs(float(loss) - torch.tensor(64.0).log()) < 0.05


def test_observer_sees_the_input_of_every_matrix_and_changes_nothing():
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


def test_compiles_as_one_graph():
    model = random_model(torch.float32)
    tokens = torch.randint(64, (2, 9))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    eager = model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), eager)


def test_bfloat16_is_close_to_float32():
    model = random_model(torch.float32)
    tokens = torch.randint(64, (4, 33))
    exact = float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach())
    model.dtype = torch.bfloat16
    assert abs(float(model.loss(tokens[:, :-1], tokens[:, 1:]).detach()) - exact) < 0.02 * exact
