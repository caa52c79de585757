"""How training goes on and how it ends: checkpoints beside it, damaged and tampered ones, a full disk, divergence."""

import functools
import math
import re
import threading
import time

import pytest
import torch
from small_trainer import make_trainer, no_score, weights

from pgolf.errors import DataError, UserError
from pgolf.runtime import clock
from pgolf.training import checkpoint
from pgolf.training.recorder import Diverged


@pytest.fixture
def trainer(tmp_path):
    """trainer(ITERATIONS="3") -> a Trainer."""
    return functools.partial(make_trainer, tmp_path)


def test_checkpoint_continues_exactly(trainer):
    whole = trainer(ITERATIONS="6")
    whole.train(no_score)
    first = trainer(ITERATIONS="6")
    for _ in range(3):
        scale = first.schedule.lr_scale(first.step / first.settings.iterations)
        first.take_step(scale)
        first.step += 1
        first.average.update(first.step, scale)
    first.save()
    second = trainer(ITERATIONS="6")
    second.warm_up()
    second.load()
    assert second.step == 3
    second.train(no_score)
    torch.testing.assert_close(weights(second), weights(whole), rtol=1e-6, atol=1e-7)


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_serves(trainer, tmp_path):
    t = trainer()
    t.step = 5
    t.save()
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a checkpoint") as error:
        t.load()
    assert "\n" not in str(error.value)
    (tmp_path / "checkpoint.previous.pt").write_bytes(content)
    t = trainer()
    t.load()
    assert t.step == 5
    assert re.search(r"checkpoint\.pt: .*damaged.*; going back to checkpoint\.previous\.pt$", t.run.lines[-2])


def adam_momentum(state: dict) -> dict:
    return state["optimisers"][1]["state"][0]


TAMPERED = {
    "a matrix too few": lambda s: s["model"].popitem(),
    "a matrix of another shape": lambda s: s["model"].update(embedding=torch.zeros(3, 3)),
    "no average": lambda s: s.update(average=None),
    "an optimiser too few": lambda s: s["optimisers"].pop(),
    "no state of Muon's": lambda s: s["optimisers"][0].pop("state"),
    "a bank too few": lambda s: s["optimisers"][0]["state"].popitem(),
    "momentum of another shape": lambda s: s["optimisers"][0]["state"][0].update(momentum_buffer=torch.zeros(1, 1, 1)),
    "momentum not finite": lambda s: s["optimisers"][0]["state"][0]["momentum_buffer"].fill_(math.nan),
    "momentum a number": lambda s: s["optimisers"][0]["state"][0].update(momentum_buffer=0.0),
    "a parameter too many": lambda s: s["optimisers"][1]["state"].update({99: adam_momentum(s)}),
    "no second moment": lambda s: adam_momentum(s).pop("exp_avg_sq"),
    "negative second moments": lambda s: adam_momentum(s)["exp_avg_sq"].fill_(-1.0),
    "negative Adam step": lambda s: adam_momentum(s)["step"].fill_(-4.0),
    "Adam steps of a word": lambda s: adam_momentum(s).update(step="many"),
    "far position": lambda s: s["loader"].update(position=10**9),
    "negative position": lambda s: s["loader"].update(position=-1),
    "position a word": lambda s: s["loader"].update(position="12"),
    "position a fraction": lambda s: s["loader"].update(position=[1.5]),
    "no position": lambda s: s["loader"].pop("position"),
    "negative epoch": lambda s: s["loader"].update(epoch=-3),
    "another seed": lambda s: s["loader"].update(seed=4),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_checkpoint_is_refused_in_one_line(case, stepped, tmp_path):
    state = torch.load(stepped.run.folder / "checkpoint.pt", weights_only=True)
    TAMPERED[case](state)
    torch.save(state, tmp_path / "checkpoint.pt")
    t = make_trainer(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a checkpoint of ") as error:
        t.load()
    assert "\n" not in str(error.value)
    assert t.step == 0


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A Trainer that took two steps and left its checkpoint."""
    t = make_trainer(tmp_path_factory.mktemp("stepped"), ITERATIONS="2")
    t.train(no_score)
    return t


def test_rates_in_a_checkpoint_are_not_taken(stepped, tmp_path):
    state = torch.load(stepped.run.folder / "checkpoint.pt", weights_only=True)
    for optimiser in state["optimisers"]:
        optimiser["param_groups"] = [{"lr": "much", "steps": 10**9, "params": []}]
    torch.save(state, tmp_path / "checkpoint.pt")
    t = make_trainer(tmp_path)
    t.load()
    assert t.optimisers.muon.param_groups[0]["steps"] == 5
    t.take_step(1.0)


def test_a_documents_position_that_is_not_there_is_refused(trainer):
    t = trainer(LOADER="documents")
    whole = t.loader.state_dict()
    for place in ({"token": 10**9}, {"shard": 1}, {"epoch": -1}, {"token": True}):
        with pytest.raises(DataError, match="cannot resume the data order"):
            t.loader.load_state_dict({**whole, **place})
    t.loader.load_state_dict({**whole, "token": 1999})
    t.loader.next_batch()


def test_checkpoints_come_with_the_minutes_and_stop_the_clock_for_a_copy_alone(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "SYNCHRONISE_SECONDS", 0.1)  # a checkpoint can begin at such a moment only
    t = trainer(ITERATIONS="150", CHECKPOINT_MINUTES="0.005")  # every 0.3 s
    t.warm_up()
    save, writing = checkpoint.save, []

    def slowly(path, state, keep_old):
        writing.append((t.step, state["step"], threading.current_thread() is threading.main_thread()))
        time.sleep(0.4)
        return save(path, state, keep_old)

    monkeypatch.setattr(checkpoint, "save", slowly)
    take_step = t.take_step
    t.take_step = lambda scale: time.sleep(0.01) or take_step(scale)
    t.train(no_score)
    *beside, last = writing
    assert len(beside) >= 1
    assert not any(in_main for *_, in_main in beside)
    assert last == (150, 150, True)
    assert t.run.noted["checkpoints"] == len(writing)
    assert t.run.noted["checkpoint_seconds"] < 0.4 * len(beside)  # a write takes longer
    before, newest = (torch.load(tmp_path / n, weights_only=True) for n in (checkpoint.PREVIOUS, "checkpoint.pt"))
    assert (newest["step"], before["step"]) == (150, beside[-1][1])
    lines = [line for line in t.run.lines if line.startswith("checkpoint: step:")]
    assert len(lines) == len(writing)
    assert re.fullmatch(r"checkpoint: step:\d+ clock_stopped:\d+ms written:\d+ms bytes:\d+", lines[0])


def test_a_checkpoint_beside_training_continues_exactly(trainer, tmp_path):
    """What is written is the state of that step, whatever training does to it meanwhile."""
    whole = trainer(ITERATIONS="6")
    whole.train(no_score)
    first = trainer(ITERATIONS="6")
    take_step = first.take_step

    def step(scale):
        if first.step == 3:
            first.save(beside=True)
        return take_step(scale)

    first.take_step = step
    first.train(no_score)
    (tmp_path / "checkpoint.previous.pt").rename(tmp_path / "checkpoint.pt")
    second = trainer(ITERATIONS="6")
    second.load()
    assert second.step == 3
    second.train(no_score)
    torch.testing.assert_close(weights(second), weights(whole), rtol=1e-6, atol=1e-7)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(trainer, monkeypatch, tmp_path):
    t = trainer(ITERATIONS="3")
    t.save()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    t.save(beside=True)
    t.train(no_score)
    assert t.step == 3
    told = [line for line in t.run.lines if line.startswith("warning: ")]
    path = tmp_path / "checkpoint.pt"
    assert (
        told
        == [f"warning: {path}: cannot be written (No space left on device); the run goes on without this checkpoint"]
        * 2
    )
    assert checkpoint.load(path)["step"] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.suffix != ".bin") == ["checkpoint.pt"]
    assert t.run.noted["checkpoints"] == 1


def test_a_damaged_checkpoint_does_not_displace_the_good_one(trainer, tmp_path):
    for step in (3, 4):
        t = trainer()
        t.step = step
        t.save()
    (tmp_path / "checkpoint.previous.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    t = trainer()
    t.load()
    assert t.step == 4
    for step in (5, 6):
        t.step = step
        t.save()
        steps = [checkpoint.load(path)["step"] for path in checkpoint.candidates(tmp_path)]
        assert steps == [step, step - 1]


def lose_the_loss(t, after: int, steps: int) -> None:
    """From step `after` on the loss is NaN, for so many steps."""
    take_step = t.take_step
    t.take_step = lambda scale: take_step(scale) * (math.nan if after <= t.step < after + steps else 1.0)


def test_a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint(trainer, tmp_path):
    t = trainer(ITERATIONS="100000")
    t.step = 7
    t.save()
    lose_the_loss(t, after=20, steps=10**9)
    with pytest.raises(Diverged, match=r"^step \d+: the loss has not been finite for 10 steps; kept: checkpoint\.pt$"):
        t.train(no_score)
    assert t.step >= 30
    assert t.run.noted["steps"] == t.step
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 7


def test_a_loss_that_comes_back_is_no_divergence(trainer):
    t = trainer(ITERATIONS="40")
    lose_the_loss(t, after=20, steps=9)
    t.train(no_score)
    assert t.step == 40


@pytest.mark.parametrize("where", ["weights", "average"])
def test_weights_that_are_not_finite_are_no_result(where, trainer, tmp_path):
    t = trainer(ITERATIONS="3")
    t.save()
    take_step = t.take_step

    def step(scale):
        if t.step == 2:
            with torch.no_grad():
                (t.parameters if where == "weights" else t.average.average)[0][0, 0] = math.inf
        return take_step(scale)

    t.take_step = step
    with pytest.raises(Diverged, match="its weights are not finite"):
        t.train(no_score)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 0
    assert any("not written, for the weights of step 3 are not finite" in line for line in t.run.lines)
