"""Muon on banks, the moving average, and the grouping of parameters."""

import copy

import pytest
import torch
from torch import nn

from pgolf import ops
from pgolf.model import Model, ModelConfig
from pgolf.optim import Ema, Muon, make_optimisers
from pgolf.settings import load_settings


def test_one_step_is_the_formula():
    torch.manual_seed(0)
    bank = nn.Parameter(torch.randn(3, 16, 8, dtype=torch.float64))
    start = bank.detach().clone()
    optimiser = Muon([bank], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float64)
    buffer = torch.zeros_like(start)
    expected = start
    for _ in range(3):
        gradient = torch.randn_like(start)
        bank.grad = gradient.clone()
        optimiser.step()
        buffer = 0.9 * buffer + gradient
        direction = ops.newton_schulz(gradient + 0.9 * buffer, "polar_express", 5)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * direction  # 16 rows, 8 columns: sqrt(16 / 8)
    torch.testing.assert_close(bank.detach(), expected)


def test_each_matrix_of_a_bank_goes_its_own_way():
    torch.manual_seed(0)
    gradient = torch.randn(4, 8, 12)
    whole = nn.Parameter(torch.zeros(4, 8, 12))
    whole.grad = gradient.clone()
    Muon([whole], lr=1.0, dtype=torch.float32).step()
    for index in range(4):
        alone = nn.Parameter(torch.zeros(1, 8, 12))
        alone.grad = gradient[index : index + 1].clone()
        Muon([alone], lr=1.0, dtype=torch.float32).step()
        torch.testing.assert_close(whole[index], alone[0], rtol=1e-4, atol=1e-4)


def test_row_normalisation_makes_the_step_blind_to_the_scale_of_rows():
    torch.manual_seed(0)
    gradient = torch.randn(2, 8, 12, dtype=torch.float64)
    steps = []
    for scale in (torch.ones(2, 8, 1), torch.logspace(-2, 2, 16).view(2, 8, 1)):
        bank = nn.Parameter(torch.zeros(2, 8, 12, dtype=torch.float64))
        bank.grad = gradient * scale
        Muon([bank], lr=1.0, row_normalize=True, dtype=torch.float64).step()
        steps.append(bank.detach())
    torch.testing.assert_close(*steps)


def test_state_survives_saving():
    torch.manual_seed(0)
    banks = [nn.Parameter(torch.zeros(2, 8, 8)) for _ in range(2)]
    optimisers = [Muon([bank], lr=0.1, dtype=torch.float32) for bank in banks]
    gradients = torch.randn(4, 2, 8, 8)
    for gradient in gradients[:2]:
        banks[0].grad = gradient
        optimisers[0].step()
    with torch.no_grad():
        banks[1].copy_(banks[0])
    optimisers[1].load_state_dict(copy.deepcopy(optimisers[0].state_dict()))
    for bank, optimiser in zip(banks, optimisers, strict=True):
        for gradient in gradients[2:]:
            bank.grad = gradient.clone()
            optimiser.step()
    assert torch.equal(*(bank.detach() for bank in banks))


def test_muon_refuses_what_is_no_bank():
    with pytest.raises(ValueError, match=r"banks.*\(4, 4\)"):
        Muon([nn.Parameter(torch.zeros(4, 4))], lr=0.1)


def test_every_parameter_has_one_optimiser():
    settings = load_settings({"PRESET": "demo"})
    model = Model(ModelConfig.of(settings))
    optimisers = make_optimisers(model, settings)
    owned = [p for o in optimisers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    assert all("base_lr" in group for o in optimisers for group in o.param_groups)


def test_moving_average():
    weight = torch.zeros(3)
    ema = Ema([weight], decay=0.9)
    expected = torch.zeros(3)
    for step in range(1, 200):
        weight += 1
        ema.update()
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * weight
    ema.copy_to_parameters()
    torch.testing.assert_close(weight, expected)
    assert 185 < weight[0] < 199  # about ten steps behind
