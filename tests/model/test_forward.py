"""The model is what its formulas say, and one forward pass serves everything."""

import pytest
import torch
from plain_model import plain_logits
from techniques import TECHNIQUES


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
        model.enter(looping=looping)
        torch.testing.assert_close(model(tokens[None])[0], plain_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_banks_are_fake_quantised_once_a_pass_and_gradients_go_through(random_model):
    model = random_model(num_loops=1, loop_start=1, loop_end=2)
    tokens, targets = torch.randint(64, (2, 2, 9))
    seen = []

    def halve(name, bank):
        seen.append(name)
        return bank / 2

    model.enter(looping=True, fake_quantize=halve)
    model.loss(tokens, targets).backward()
    assert sorted(seen) == ["down_bank", "kv_bank", "qo_bank", "up_bank"]
    through = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.enter(looping=True)
    with torch.no_grad():
        for name in seen:
            getattr(model, name).div_(2)
    model.loss(tokens, targets).backward()
    for name in seen:
        torch.testing.assert_close(2 * through[name], getattr(model, name).grad, rtol=1e-5, atol=1e-7)


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
