"""Schedules, averages of weights, rounded weights and losses: each against its formula."""

import math

import pytest
import torch

from pgolf.data.tokenizer import ByteTable
from pgolf.model import Model, ModelConfig
from pgolf.quantization.quantizers import rtn
from pgolf.settings import Settings, load_settings
from pgolf.training.averaging import Ema, Swa, make_average
from pgolf.training.losses import TrainingLoss
from pgolf.training.qat import SHARPEST, SOFTEST, FakeQuantize, row_scale, soft_round
from pgolf.training.schedule import Phase, Schedule, used_fraction

CPU = torch.device("cpu")


# The budget


def test_the_budget_is_used_by_steps_or_by_time_whichever_ends_first():
    assert used_fraction(100, 75, 0.0, 60.0) == used_fraction(100, 0, 45.0, 60.0) == 0.75
    assert used_fraction(100, 10, 61.0, 60.0) == 1.0


def test_the_learning_rate_falls_to_its_floor():
    schedule = Schedule.of(Settings(warmdown_frac=0.5, min_lr=0.1))
    assert [schedule.lr_scale(used) for used in (0.0, 0.5, 0.75, 0.96, 1.0)] == [1, 1, 0.5, 0.1, 0.1]
    assert Schedule.of(Settings(warmdown_frac=0.0)).lr_scale(1.0) == 1.0
    assert Schedule.of(Settings(warmdown_frac=1.0)).lr_scale(0.25) == 0.75


def test_a_run_goes_through_these_phases():
    plain = Schedule.of(Settings())
    assert plain.phases() == [Phase(1024, False, False)]
    schedule = Schedule.of(
        Settings(
            train_seq_schedule="256@0.1,512@0.7",
            num_loops=2,
            loop_end=4,
            enable_looping_at=0.35,
            qat="ste",
            warmdown_frac=0.5,
            late_qat_threshold=0.4,
        )
    )
    assert schedule.phases() == [
        Phase(256, False, False),
        Phase(512, False, False),
        Phase(512, True, False),
        Phase(1024, True, False),
        Phase(1024, True, True),
    ]
    assert [schedule.phase_at(used).seq_len for used in (0, 0.099, 0.1, 0.699, 0.7, 1)] == [256] * 2 + [512] * 2 + [
        1024
    ] * 2
    assert [schedule.phase_at(used).looping for used in (0.349, 0.35, 1)] == [False, True, True]
    assert [schedule.phase_at(used).quantized for used in (0.799, 0.801, 1)] == [False, True, True]
    assert {schedule.phase_at(i / 1000) for i in range(1001)} == set(schedule.phases())
    always = Schedule.of(Settings(num_loops=1, enable_looping_at=0.0, qat="ste"))
    assert always.phases() == [Phase(1024, True, True)]


# Averages


def test_moving_average():
    weight = torch.zeros(3)
    ema = Ema([weight], decay=0.9)
    expected = torch.zeros(3)
    for step in range(1, 200):
        weight += 1
        ema.update(step, 1.0)
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * weight
    ema.copy_to_parameters()
    torch.testing.assert_close(weight, expected)
    assert 185 < weight[0] < 199  # about ten steps behind


def test_stochastic_weight_averaging_is_the_mean_of_the_late_weights():
    schedule = Schedule.of(Settings(warmdown_frac=0.8))
    weight = torch.zeros(3)
    swa = make_average([weight], ema_decay=0.0, swa_every=3, swa_start_frac=0.5)
    assert isinstance(swa, Swa)
    taken = []
    for step in range(1, 41):
        weight.normal_()
        if step % 3 == 0 and step >= 24:  # 1 - 0.5 * 0.8 of 40 steps
            taken.append(weight.clone())
        swa.update(step, schedule.lr_scale(step / 40))
    resumed = Swa([weight], 3, 0.5)
    resumed.load_state_dict(swa.state_dict())
    resumed.copy_to_parameters()
    torch.testing.assert_close(weight, torch.stack(taken).mean(0))


def test_without_an_update_the_weights_stay():
    weight = torch.ones(3)
    average = Swa([weight], 1000, 0.5)
    weight += 1
    average.copy_to_parameters()
    assert weight.tolist() == [2, 2, 2]
    assert make_average([weight], ema_decay=0.0, swa_every=0, swa_start_frac=0.5) is None


# Quantisation-aware training


def fake_quantize(form: str, bits: int = 6, **clip_sigmas: float) -> FakeQuantize:
    return FakeQuantize(form, bits, {"attention": 12.85, "mlp": 12.85, "embedding": 20.0, **clip_sigmas}, CPU)


@pytest.mark.parametrize("bits", [4, 6])
def test_the_forward_pass_sees_what_rounding_to_nearest_stores(bits):
    bank = torch.randn(3, 20, 64)
    bank[0, 0], bank[1, 1] = 0.0, 0.25  # rows without variance
    for name, sigmas in (("qo_bank", 5.0), ("up_bank", 3.0)):
        fake = fake_quantize("ste", bits, attention=5.0, mlp=3.0)
        assert torch.equal(fake(name, bank), rtn(bank, torch.empty(0), bits, sigmas, 0.0).dequantize())


def test_straight_through_gradients_pass_unchanged():
    bank = torch.randn(2, 8, 32, requires_grad=True)
    gradient = torch.randn(2, 8, 32)
    fake_quantize("ste")("kv_bank", bank).backward(gradient)
    assert torch.equal(bank.grad, gradient)


def test_soft_rounding_goes_from_identity_to_rounding_and_has_its_own_gradient():
    x = torch.randn(500, dtype=torch.float64) * 3
    sharp = [float((soft_round(x, torch.tensor(a)) - x.round()).abs().mean()) for a in (1e-3, SOFTEST, 4.0, 64.0)]
    assert sharp == sorted(sharp, reverse=True)
    assert sharp[-1] < 0.03
    torch.testing.assert_close(soft_round(x, torch.tensor(1e-3, dtype=torch.float64)), x, rtol=0, atol=1e-6)
    assert torch.equal(soft_round(torch.arange(-3.0, 4.0), torch.tensor(5.0)), torch.arange(-3.0, 4.0))
    inside = (x - x.floor() - 0.5).abs() < 0.49
    assert torch.autograd.gradcheck(lambda v: soft_round(v, torch.tensor(4.0)), x[inside][:50].requires_grad_())

    fake = fake_quantize("soft_round", mlp=2.0)
    fake.set_progress(1.0)
    assert float(fake.sharpness) == SHARPEST
    bank = torch.randn(2, 8, 256, requires_grad=True)
    out = fake("up_bank", bank)
    out.sum().backward()
    scale = row_scale(bank.detach(), 2.0, 31).unsqueeze(-1)
    clipped = (bank.detach() / scale).abs() > 32
    assert clipped.any()
    assert (bank.grad[clipped] == 0).all()
    assert float((out.detach() - rtn(bank.detach(), torch.empty(0), 6, 2.0, 0.0).dequantize()).abs().max()) <= float(
        scale.max()
    )


SMALL = {
    "PRESET": "demo",
    "VOCAB_SIZE": "64",
    "MODEL_DIM": "32",
    "NUM_LAYERS": "1",
    "PARALLEL_START_LAYER": "0",
    "DTYPE": "float32",
}


def make_model() -> Model:
    model = Model(ModelConfig.of(load_settings(SMALL))).initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("qo_bank", "down_bank"):
            getattr(model, name).normal_(0, 0.1)
    return model


@pytest.mark.parametrize("form", ["ste", "soft_round"])
def test_the_switch_changes_the_loss(form):  # under the compiler too: test_train.py
    model = make_model()
    fake, rows, seen = fake_quantize(form, 2, attention=2.0, mlp=2.0), torch.randint(0, 64, (2, 17)), []
    for quantize, progress in ((None, 0), (fake, 0.1), (fake, 0.9), (None, 0)):
        model.enter(looping=False, fake_quantize=quantize)
        fake.set_progress(progress)
        seen.append(model.loss(rows[:, :-1], rows[:, 1:], "none").detach())  # of every token: a mean may hide it
    assert (seen[1] - seen[0]).abs().max() > 1e-4
    assert torch.equal(seen[3], seen[0])
    assert torch.equal(seen[1], seen[2]) == (form == "ste")


# Losses


def losses_one_by_one(model: Model, rows: torch.Tensor) -> torch.Tensor:
    capped = model.config.logit_softcap * torch.tanh(model(rows[:, :-1]).detach() / model.config.logit_softcap)
    return -capped.log_softmax(-1)  # (rows, length, vocab)


def test_bytes_weigh_tokens():
    model = make_model()
    bytes_of = torch.randint(0, 9, (64,))
    spaces, borders = torch.rand(64) < 0.5, torch.rand(64) < 0.1
    rows = torch.randint(0, 64, (3, 17))
    found = TrainingLoss(model, byte_table=ByteTable(bytes_of, spaces, borders))(rows[:, :-1], rows[:, 1:])
    nats, total = 0.0, 0
    every = losses_one_by_one(model, rows)
    for row, column in ((r, c) for r in range(3) for c in range(16)):
        before, target = rows[row, column], rows[row, column + 1]
        weight = max(1, int(bytes_of[target]) + int(spaces[target] and not borders[before]))
        nats += weight * float(every[row, column, target])
        total += weight
    assert float(found.detach()) == pytest.approx(nats / total, rel=1e-5)


@pytest.mark.parametrize("ahead", [1, 2, 40])
def test_further_tokens_are_asked_of_the_same_logits_within_a_document(ahead):
    model = make_model()
    bos_id = model.config.bos_id
    rows = torch.randint(0, 64, (3, 17))
    rows[torch.rand(3, 17) < 0.15] = bos_id
    every, loss = losses_one_by_one(model, rows), TrainingLoss(model, ahead, 0.5)

    def mean(step: int) -> float:
        parts = []
        for row, column in ((r, c) for r in range(3) for c in range(16 - step)):
            if bos_id not in rows[row, column + 1 : column + 1 + step].tolist():
                parts.append(float(every[row, column, rows[row, column + 1 + step]]))
        return sum(parts) / max(1, len(parts))

    for used, weight in ((0.0, 0.5), (0.6, 0.2), (1.0, 0.0)):
        loss.set_progress(used)
        expected = mean(0) + weight * sum(mean(step) for step in range(1, min(ahead, 15) + 1))
        assert float(loss(rows[:, :-1], rows[:, 1:]).detach()) == pytest.approx(expected, rel=1e-4)
    assert math.isclose(mean(0), float(model.loss(rows[:, :-1], rows[:, 1:]).detach()), rel_tol=1e-5)
