"""The training loop's parts: schedule, budget, warm-up, micro-batches, calibration."""

import functools
import itertools
import math
import re
import time

import pytest
import torch
from small_trainer import make_trainer, no_score, weights

from pgolf.artifact import read_artifact, write_artifact
from pgolf.artifact.model import model_from_artifact
from pgolf.data.batch import MicroBatch
from pgolf.errors import ArtifactError, Interrupted, UserError
from pgolf.evaluation.scoring import Score
from pgolf.model import Execution
from pgolf.model.flops import flops_per_token
from pgolf.quantization.calibration import collect_hessians
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.quantize import quantize
from pgolf.runtime.clock import Clock, Stopwatch
from pgolf.runtime.ranks import Ranks
from pgolf.training import trainer as train
from pgolf.training.recorder import Aborted, Diverged

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture
def trainer(tmp_path):
    """trainer(ITERATIONS="3") -> a Trainer."""
    return functools.partial(make_trainer, tmp_path)


def test_learns_a_period(trainer):
    t = trainer(ITERATIONS="60", WARMUP_STEPS="0")
    rows = next(iter(t.loader.next_batch()))
    before = float(t.model.loss(rows[:, :-1], rows[:, 1:]).detach())
    t.train(no_score)
    after = float(t.model.loss(rows[:, :-1], rows[:, 1:]).detach())
    assert before > 3.5
    assert after < 0.5


def test_warm_up_leaves_no_trace(trainer):
    runs = []
    for steps in ("0", "3"):
        t = trainer(ITERATIONS="4", WARMUP_STEPS=steps)
        t.warm_up()
        t.train(no_score)
        runs.append(weights(t))
    assert torch.equal(*runs)


def test_micro_batches_only_cut_the_work(trainer):
    runs = []
    for tokens in ("128", "48", "16"):
        t = trainer(ITERATIONS="2", MICRO_BATCH_TOKENS=tokens)
        t.train(no_score)
        runs.append(weights(t))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-3, atol=1e-4)


def test_the_wall_clock_is_a_hard_limit(trainer):
    t = trainer(MAX_WALLCLOCK_SECONDS="2", GPTQ_RESERVE_SECONDS="1")
    t.warm_up()
    t.train(no_score)
    assert 0.5 < t.used_seconds < 2.0  # 1.0 and jitter; what is beyond it comes out of the reserve
    assert t.step > 5
    assert any(line.startswith("stopping_early: wallclock_cap") for line in t.run.lines)


def test_the_ranks_synchronise_seldom_until_the_end_comes_near():
    clock = Clock(0.0, 0.01)
    now, promised = 0.0, []
    step_seconds = itertools.cycle([0.01, 0.01, 0.02])
    while steps := clock.steps_ahead(limit=20.0):
        promised.append(steps)
        for _ in range(steps):
            seconds = next(step_seconds)
            now += seconds
            clock.tick(seconds)
        clock.read(now)
    assert 19.9 < now <= 20.0
    assert promised[1] == 50  # a second of the slowest steps
    assert promised[-1] == 1
    assert len(promised) < 60
    assert Clock(0.0, 0.0).steps_ahead(1.0) == 1  # nothing known yet
    assert Clock(0.5, 0.6).steps_ahead(1.0) == 0


def test_a_slow_step_is_remembered_for_a_while():
    clock = Clock(0.0, 0.1)
    clock.tick(0.5)
    clock.read(0.5)
    assert clock.steps_ahead(100.0) == 2
    for now in range(1, 21):
        clock.tick(0.1)
        clock.read(0.5 + 0.1 * now)
    assert clock.steps_ahead(100.0) in (9, 10)


def test_ranks_synchronise_about_once_a_second(trainer, monkeypatch):
    t = trainer(ITERATIONS="200")
    t.warm_up()
    messages = []
    share = Ranks.share
    monkeypatch.setattr(Ranks, "share", lambda *args, **kw: messages.append(1) or share(*args, **kw))
    t.train(no_score)
    assert t.step == 200
    assert len(messages) < 50


def test_a_signal_is_noticed_at_the_next_step(trainer):
    t = trainer(ITERATIONS="10000")
    t.warm_up()
    calls = itertools.count()
    take_step = t.take_step

    def step(scale):
        if next(calls) == 7:
            t.run.signal = 15
        return take_step(scale)

    t.take_step = step
    with pytest.raises(Interrupted):
        t.train(no_score)
    assert t.step == 8
    assert (t.run.folder / "checkpoint.pt").exists()


def test_a_compiled_step_that_pads_documents_warns_before(trainer):
    documents = {"LOADER": "documents", "BOS_ID": "1", "COMPILE": "on", "WARMUP_STEPS": "0", "CUDA_GRAPHS": "off"}
    longer = {"TRAIN_BATCH_TOKENS": "512", "MICRO_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "64"}
    for changes, lines in (({}, 1), ({"LOADER": "shuffled"}, 0), ({"COMPILE": "off"}, 0)):
        t = trainer(**{**documents, **longer, **changes})
        t.warm_up()
        warned = [line for line in t.run.lines if line.startswith("warning: attention by sdpa pads packed documents")]
        assert len(warned) == lines
        if lines:
            assert "rows of 64 tokens: 4,032 tokens for 256 (15.8 times)" in warned[0]


def test_validation_comes_when_asked_for_and_stops_the_clock(trainer):
    t = trainer(ITERATIONS="5", VAL_LOSS_EVERY="2")
    t.train(lambda: time.sleep(1.0))
    assert t.run.scored == [2, 4]
    assert t.used_seconds < 1.0


def test_a_loss_weighted_by_bytes_needs_the_tokenizers(trainer):
    with pytest.raises(ValueError, match="byte_table"):
        trainer(BYTE_WEIGHTED_LOSS="1")


def test_a_budget_below_one_step_is_refused(trainer):
    t = trainer(MAX_WALLCLOCK_SECONDS="0.0001", GPTQ_RESERVE_SECONDS="0")
    t.warm_up()
    with pytest.raises(UserError, match=r"MAX_WALLCLOCK_SECONDS=0\.0001 is too small for one step"):
        t.train(no_score)


STAGES = {
    "ITERATIONS": "12",
    "LOADER": "documents",
    "TRAIN_SEQ_SCHEDULE": "6@0.5",
    "NUM_LOOPS": "1",
    "LOOP_END": "0",
    "ENABLE_LOOPING_AT": "0.25",
    "QAT": "soft_round",
    "LATE_QAT_THRESHOLD": "0.5",
    "WARMDOWN_FRAC": "0.5",
}


def test_what_a_run_goes_through_is_compiled_in_warm_up(trainer, monkeypatch):
    """Sequence length, depth recurrence and rounding change on the way, the compiler has seen all of it, and each
    change does something: in the #549 lineage a late switch was dead code, traced once as off (#2072)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    t = trainer(**STAGES, COMPILE="on", NUM_LAYERS="1", PARALLEL_START_LAYER="0", MATRIX_BITS="3")
    before = weights(t)
    t.warm_up()
    assert torch.equal(weights(t), before)
    lengths, compiled = [], t.loss

    def count(*batch):
        _, _, borders, longest = batch
        lengths.append((longest, int(borders.diff().max()), t.model.looping, t.model.fake_quantize is not None))
        loss = compiled(*batch)
        torch.testing.assert_close(loss, t.training_loss(*batch), rtol=1e-6, atol=0)  # eager sums it in other chunks
        state = {"looping": t.model.looping, "fake_quantize": t.model.fake_quantize}
        for switch, off in (("looping", False), ("fake_quantize", None)):
            if state[switch]:
                t.model.enter(**{**state, switch: off})
                assert float(t.training_loss(*batch) - loss) != 0.0
                t.model.enter(**state)
        return loss

    t.loss = count
    t.train(no_score)
    assert t.run.noted["recompilations"] == 0
    assert [phase for phase, _ in itertools.groupby(lengths)] == [
        (6, 6, False, False),
        (6, 6, True, False),
        (16, 10, True, False),  # documents of 10
        (16, 10, True, True),
    ]
    assert [line.split()[1] for line in t.run.lines if line.startswith("phase: ")] == ["step:3", "step:6", "step:9"]
    assert t.model.looping
    assert t.model.fake_quantize is None
    steps = [flops_per_token(t.model.config, looping, length) for length, _, looping, _ in lengths]
    assert t.flops == 128 * sum(steps) == pytest.approx(1e12 * t.run.noted["tflop_per_s"] * t.used_seconds)
    assert t.run.noted["step_ms"] == 1000 * t.used_seconds / 12
    assert t.run.noted["peak_memory_bytes"] > 1 << 26
    assert "mfu" not in t.run.noted
    assert any(re.match(r"step_ms:\S+ tflop_per_s:\S+ peak_memory_bytes:\d+$", line) for line in t.run.lines)


def test_stages_are_resumed_where_they_were(trainer):
    environ = {**STAGES, "EMA_DECAY": "0", "SWA_EVERY": "2", "MTP_TOKENS": "1"}
    whole = trainer(**environ)
    whole.train(no_score)
    first = trainer(**environ)
    take_step, calls = first.take_step, itertools.count(1)

    def step(scale):
        first.run.signal = 15 if next(calls) == 10 else None
        return take_step(scale)

    first.take_step = step
    with pytest.raises(Interrupted):
        first.train(no_score)
    second = trainer(**environ)
    second.warm_up()
    second.load()
    assert (second.step, second.average.updates) == (10, 1)
    second.train(no_score)
    assert second.flops == whole.flops
    torch.testing.assert_close(weights(second), weights(whole), rtol=1e-6, atol=1e-7)


def test_a_run_that_begins_badly_is_aborted(trainer):
    score = Score(nats=80.0 * math.log(2), tokens=50, bytes=40)  # 2 bits a byte
    t = trainer(ITERATIONS="9", ABORT_STEP="4", ABORT_BPB="1.99", QAT="ste")
    with pytest.raises(Aborted, match=r"^step 4: val_bpb 2\.0000 is above ABORT_BPB=1\.99$"):
        t.train(lambda: score if t.model.fake_quantize is None else no_score())
    assert (t.step, t.run.scored) == (4, [4])
    assert (t.run.noted["steps"], t.run.noted["val_bpb_float"]) == (4, pytest.approx(2.0))
    for bpb in ("2.01", "0"):
        t = trainer(ITERATIONS="6", ABORT_STEP="4", ABORT_BPB=bpb)
        t.train(lambda: score)
        assert (t.step, t.run.scored) == (6, [4])
    t = trainer(ITERATIONS="9", ABORT_STEP="4", ABORT_BPB="3")
    with pytest.raises(Diverged, match=r"^step 4: .* is nan"):
        t.train(lambda: Score(nats=math.nan, tokens=50, bytes=40))


class SlowDevice(Stopwatch):
    """A clock as on a GPU: a mark passes only when two later ones are set, or when it is waited for."""

    def __init__(self, device, seconds=0.0):
        self.waited, self.marks = [], []
        super().__init__(device, seconds)
        self.cuda = True

    def mark(self):
        self.marks.append(time.perf_counter())
        return len(self.marks) - 1

    def seconds(self, mark):
        self.waited.append(len(self.marks) - 1 - mark)
        return self.seconds_before + self.marks[mark] - self.marks[self.begin]

    def passed(self, mark):
        return len(self.marks) > mark + 2


def test_the_host_waits_only_for_what_lies_steps_back(trainer, monkeypatch):
    watches = []
    monkeypatch.setattr(train, "Stopwatch", lambda *args: watches.append(SlowDevice(*args)) or watches[-1])
    t = trainer(ITERATIONS="60", TRAIN_LOG_EVERY="7")
    t.warm_up()
    t.train(no_score)
    (watch,) = watches
    *during, last = watch.waited[:-3]  # the end waits for everything
    assert len(during) > 10
    assert min([*during, last]) >= 2
    steps = [int(line.split("/")[0].removeprefix("step:")) for line in t.run.lines if line.startswith("step:")]
    assert steps == [*range(1, 11), *range(14, 60, 7)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_at_no_step_and_nothing_is_compiled_after_warm_up(trainer, monkeypatch):
    settings = {**STAGES, "ITERATIONS": "40", "MODEL_DIM": "64", "DTYPE": "bfloat16", "TRAIN_LOG_EVERY": "5"}
    t = trainer(torch.device("cuda", torch.cuda.current_device()), **settings)
    assert t.compiled
    t.warm_up()
    monkeypatch.setattr(t, "save", lambda: None)  # it copies to the host
    monkeypatch.setattr(t, "finite", lambda: True)  # looked at once, at the end
    torch.cuda.set_sync_debug_mode("error")
    try:
        t.train(no_score)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.step == 40
    assert t.run.noted["recompilations"] == 0


def test_hessians_are_the_second_moments_of_the_inputs(trainer):
    model = trainer().model
    batches = [MicroBatch(torch.randint(64, (2, 16)), torch.zeros(2, 16)) for _ in range(3)]
    hessians = collect_hessians(model, iter(batches), ALONE, lambda: 1e9)
    expected = {name: torch.zeros_like(h) for name, h in hessians.items()}
    for batch in batches:

        def add(name, index, x):
            flat = x.detach().reshape(-1, x.size(-1))
            expected[name][index] += flat.T @ flat

        model(batch.inputs, observe=add)
    assert hessians.keys() == {"embedding", "qo_bank", "kv_bank", "up_bank", "down_bank"}
    for name, hessian in hessians.items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-4, atol=1e-3)


def test_calibration_takes_one_batch_and_stops_when_time_is_up(trainer):
    t = trainer()
    taken = []
    clock = itertools.count(0, -10)
    batches = (taken.append(1) or MicroBatch(torch.randint(64, (2, 16)), torch.zeros(2, 16)) for _ in range(5))
    hessians = collect_hessians(t.model, batches, ALONE, lambda: 5.0 + next(clock))
    assert len(taken) == 1
    assert float(hessians["embedding"].diagonal(dim1=1, dim2=2).sum()) == pytest.approx(32 * 32, rel=0.01)


def test_quantised_model_scores_like_the_trained_one(trainer, tmp_path):
    t = trainer(ITERATIONS="60", WARMUP_STEPS="0", EMA_DECAY="0")
    t.train(no_score)
    hessians = collect_hessians(t.model, t.calibration_batches(), ALONE, lambda: 1e9)
    tensors = quantize(t.model, hessians, QuantizationConfig.of(t.settings))
    assert {x.name: x.bits for x in tensors if x.scale is not None} == {
        "embedding": 8,
        "qo_bank": 6,
        "kv_bank": 6,
        "up_bank": 6,
        "down_bank": 6,
    }
    path = tmp_path / "model.pgolf"
    write_artifact(path, tensors, {"model": t.model.config.as_dict()})
    loaded = model_from_artifact(read_artifact(path), Execution(), CPU)
    rows = torch.randint(0, 1, (1, 1)) + torch.arange(17) * 5 % 7
    trained, stored = (float(m.loss(rows[:, :-1], rows[:, 1:]).detach()) for m in (t.model, loaded))
    assert trained < 0.5
    assert abs(stored - trained) < 0.1


def test_an_artifact_of_another_shape_is_refused(trainer, tmp_path):
    t = trainer()
    hessians = collect_hessians(t.model, t.calibration_batches(), ALONE, lambda: 1e9)
    tensors = quantize(t.model, hessians, QuantizationConfig.of(t.settings))
    path = tmp_path / "model.pgolf"
    for metadata in (
        {},
        {"model": {}},
        {"model": {**t.model.config.as_dict(), "num_layers": 3}},
        {"model": {**t.model.config.as_dict(), "num_heads": 0}},
        {"model": {**t.model.config.as_dict(), "model_dim": "wide"}},
        {"model": {**t.model.config.as_dict(), "logit_softcap": "high"}},
        {"model": {**t.model.config.as_dict(), "mlp_slope": 7.0}},
        {"model": {**t.model.config.as_dict(), "seed": 1}},
        {"model": [1, 2]},
    ):
        write_artifact(path, tensors, metadata)
        with pytest.raises(ArtifactError):
            model_from_artifact(read_artifact(path), Execution(), CPU)
