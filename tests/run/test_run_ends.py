"""How a run ends: statuses and their one line, with budgets missed, a full disk, figures that fail, divergence."""

import errno
import json
import math
import re
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path

import pytest
import torch
from test_run import run_here, summary_of

from pgolf.artifact import read_artifact
from pgolf.artifact.model import model_from_artifact
from pgolf.errors import UserError
from pgolf.quantization.calibration import collect_hessians
from pgolf.run.record import Run
from pgolf.runtime.files import Lines, WriteError
from pgolf.runtime.ranks import Ranks
from pgolf.settings import load_settings
from pgolf.training import checkpoint
from pgolf.training.trainer import Trainer


@pytest.fixture
def run(tmp_path, tiny_environ, monkeypatch, capsys):
    """run(BUDGET_BYTES="9") -> (exit status, lines on stderr, lines on stdout, folder)."""
    quick = {"OUT_DIR": "runs", "RUN_ID": "one", "QUANTIZER": "rtn"}  # not longer than a line, wherever it is

    def run(**environ):
        try:
            status = run_here({**tiny_environ, **quick, **environ}, tmp_path, monkeypatch)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "UserWarning" not in line]
        return status, lines, out.splitlines(), Path("runs/one")  # `run_here` stays in tmp_path

    return run


def full_for(monkeypatch, *names: str) -> None:
    """A disk that takes everything but files of these names."""

    def full(lines, line):
        raise WriteError(lines.path, OSError(errno.ENOSPC, "No space left on device"))

    mkstemp, add = tempfile.mkstemp, Lines.add

    def refusing(suffix=None, prefix=None, dir=None, text=False):
        if prefix in {f".{name}." for name in names}:  # the temporary file that takes the name in the end
            raise OSError(errno.ENOSPC, "No space left on device")
        return mkstemp(suffix, prefix, dir, text)

    monkeypatch.setattr(tempfile, "mkstemp", refusing)
    monkeypatch.setattr(Lines, "add", lambda self, line: (full if self.path.name in names else add)(self, line))


def test_missed_budgets_are_status_four_and_one_line(run):
    status, err, _, folder = run(BUDGET_BYTES="1000", ARTIFACT_BYTES="10", MAX_EVAL_SECONDS="0.0001")
    assert status == 4
    warning, over = err
    assert re.fullmatch(r".*: warning: ARTIFACT_BYTES=10 and \d+ bytes of code are over BUDGET_BYTES=1000", warning)
    assert re.fullmatch(
        r"train_gpt\.py: over budget: [\d,]+ bytes of artifact and code, BUDGET_BYTES=1000; [\d,]+ bytes of "
        r"artifact, ARTIFACT_BYTES=10; the evaluation took longer than MAX_EVAL_SECONDS=0\.0001",
        over,
    )
    log = (folder / "train.log").read_text()
    assert log.index("warning: ARTIFACT_BYTES") < log.index("step:1/")
    summary = summary_of(folder)
    assert (summary["fits_budget"], summary["within_eval"], summary["within_wallclock"]) == (False, False, True)
    read_artifact(folder / "model.pgolf")
    assert (folder / "report.html").exists()


def test_a_full_disk_costs_figures_and_logs_but_not_the_result(run, monkeypatch):
    full_for(monkeypatch, "checkpoint.pt", "metrics.jsonl", "train.log", "report.html")
    status, err, _, folder = run()
    assert status == 2
    *warnings, last = err
    told = {line.split(": ")[2].rpartition("/")[2] for line in warnings}
    assert told == {"checkpoint.pt", "metrics.jsonl", "train.log", "report.html"}
    assert len(warnings) == 4
    assert "No space left on device" in last
    assert last.endswith(f"safe in {folder}: model.pgolf, summary.json")
    assert summary_of(folder)["val_bpb_quantized"] > 0
    read_artifact(folder / "model.pgolf")


def test_an_artifact_that_cannot_be_written_ends_the_run_in_one_line(run, monkeypatch):
    full_for(monkeypatch, "model.pgolf")
    status, (line,), _, folder = run()
    assert status == 2
    assert line == (
        f"train_gpt.py: {folder}/model.pgolf: cannot be written (No space left on device); safe in {folder}: "
        "checkpoint.pt, summary.json, report.html, metrics.jsonl, train.log"
    )
    assert summary_of(folder)["val_bpb_quantized"] is None


def test_settings_that_cannot_be_written_leave_no_folder(run, monkeypatch):
    full_for(monkeypatch, "settings.json")
    status, (line,), _, folder = run()
    assert status == 2
    assert "settings.json: cannot be written (No space left on device)" in line
    assert not folder.exists()


def test_what_is_only_a_figure_cannot_end_a_run(run, monkeypatch):
    def fails(*args, **kw):
        raise RuntimeError("no such picture\nand more")

    monkeypatch.setattr("train_gpt.SizeProjection.make", fails)
    monkeypatch.setattr("train_gpt.compressors_bpb", fails)
    monkeypatch.setattr("pgolf.run.record.write_report", fails)
    status, err, _, folder = run()
    assert status == 0
    assert [line.removeprefix("train_gpt.py: warning: ") for line in err] == [
        f"{what} could not be made (RuntimeError: no such picture); the run goes on"
        for what in ("the size projection", "the other compressors' figures", "the report")
    ]
    assert summary_of(folder)["val_bpb_quantized"] > 0


def test_a_diverged_run_is_status_five_with_valid_files(run, monkeypatch):
    take_step = Trainer.take_step
    monkeypatch.setattr(Trainer, "take_step", lambda self, scale: take_step(self, scale) * math.nan)
    status, _, out, folder = run(ITERATIONS="100000")
    assert status == 5
    assert re.match(r"diverged: step \d+: ", out[-1])
    summary = summary_of(folder)
    assert (summary["diverged"], summary["val_bpb_quantized"]) == (True, None)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert (folder / "report.html").exists()
    assert not (folder / "model.pgolf").exists()


def test_a_signal_while_a_run_begins_is_no_traceback(run, monkeypatch):
    """From when it is caught until the run can tell of it."""
    monkeypatch.setattr(Run, "log", lambda self, line, console=True: signal.raise_signal(signal.SIGTERM))
    status, err, _, _ = run()
    assert (status, err) == (143, [])


def test_a_signal_that_python_drops_comes_again(tmp_path):
    """As of whatever is raised in the callback of a weak reference."""
    run = Run(load_settings({"PRESET": "demo", "OUT_DIR": str(tmp_path)}), Ranks(0, 1, torch.device("cpu")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, things = sys.unraisablehook, [set()]
    reference = weakref.ref(things[0], lambda _: signal.raise_signal(signal.SIGTERM))

    def signalled():
        with run:
            things.clear()
            time.sleep(60)

    try:
        with pytest.raises(SystemExit) as end:
            signalled()
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (reference(), end.value.code) == (None, 143)


def test_a_console_that_is_gone_does_not_end_a_run(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = write

    settings = load_settings({"PRESET": "demo", "OUT_DIR": str(tmp_path), "RUN_ID": "one"})
    run = Run(settings, Ranks(0, 1, torch.device("cpu")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.__enter__()
        monkeypatch.setattr("sys.stdout", Gone())
        for line in ("said", "and again"):
            run.log(line)
        with pytest.raises(UserError, match=r"standard output \(Broken pipe\)"):
            run.__exit__(None, None, None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    log = (tmp_path / "one" / "train.log").read_text()
    assert log.index("said\n") < log.index("and again\n")


def test_second_moments_that_are_not_finite_end_the_run_in_one_line(run, monkeypatch):
    monkeypatch.setattr(
        "pgolf.quantization.calibration.ops.accumulate_hessian", lambda hessian, x: hessian.fill_(math.inf)
    )
    status, err, out, folder = run()
    assert (status, err) == (5, [])
    assert re.fullmatch(
        rf"diverged: \w+: the second moments of its inputs are not finite; safe in {folder}: checkpoint\.pt, .*",
        out[-1],
    )
    summary = summary_of(folder)
    assert (summary["diverged"], summary["steps"], summary["val_bpb_quantized"]) == (True, 6, None)
    assert (folder / "report.html").exists()
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 6


@pytest.mark.parametrize(
    ("value", "name", "said"),
    [
        (1e9, "up_bank", "up_bank: weight: a row of matrix 0 needs a scale above 65504, the largest float16"),
        (1e6, "attn_scale", "attn_scale: holds numbers that are not finite in float16"),
    ],
)
def test_weights_too_large_to_be_stored_end_the_run_in_one_line(value, name, said, run, monkeypatch):
    def collected(model, *rest):
        hessians = collect_hessians(model, *rest)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[::2] = value
        return hessians

    monkeypatch.setattr("train_gpt.collect_hessians", collected)
    status, err, out, folder = run()
    assert (status, err) == (5, [])
    assert out[-1].startswith(f"diverged: {said}; safe in {folder}: checkpoint.pt, ")
    assert summary_of(folder)["diverged"] is True
    assert not (folder / "model.pgolf").exists()


@pytest.mark.parametrize("ngram", ["off", "adaptive", "tilt"])
def test_an_artifact_without_a_score_ends_the_run_in_one_line(ngram, run, monkeypatch):
    def built(*arguments):
        model = model_from_artifact(*arguments)
        model.loss_of = lambda logits, targets, reduction: torch.full(targets.shape, math.nan)
        return model

    monkeypatch.setattr("train_gpt.model_from_artifact", built)
    status, err, out, folder = run(NGRAM=ngram)
    assert (status, err) == (5, [])
    assert re.fullmatch(rf"diverged: .*no finite numbers; safe in {folder}: model\.pgolf, checkpoint\.pt, .*", out[-1])
    summary = summary_of(folder)
    assert (summary["diverged"], summary["val_bpb_quantized"]) == (True, None)
    read_artifact(folder / "model.pgolf")


def test_memory_that_is_not_enough_is_one_line(run, monkeypatch):
    def none_left(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice")

    monkeypatch.setattr("train_gpt.read_artifact", none_left)
    status, (line,), _, folder = run()
    assert status == 2
    assert line.startswith(
        "train_gpt.py: out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.)"
    )
    files = "model.pgolf, checkpoint.pt, summary.json, report.html, metrics.jsonl, train.log"
    assert line.endswith(f"; safe in {folder}: {files}")
    assert summary_of(folder)["interrupted"] is True


def test_memory_that_is_not_enough_at_first_leaves_no_folder(run, monkeypatch):
    def none_left(*arguments):
        raise MemoryError

    monkeypatch.setattr(Trainer, "warm_up", none_left)
    status, (line,), _, folder = run()
    assert (status, line[:41]) == (2, "train_gpt.py: out of memory (MemoryError:")
    assert not folder.exists()
