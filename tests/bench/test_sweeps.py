"""The sweeps of launch parameters: they choose as they say, leave the tables alone, and try what can be launched."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench.visit import compiled_ahead, facts, sweeps
from bench.visit.candidates import families
from bench.visit.sweep_calls import QUICK, STATIC
from pgolf.triton_kernels import leaky_relu2_mlp, newton_schulz, residual_rms_norm
from pgolf.triton_kernels.row_launches import RowLaunch

ROOT = Path(__file__).parents[2]
TABLES = {table.name: table for family in sweeps.FAMILIES for table in families(QUICK)[family]()}
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


def test_a_quick_run_keeps_every_trial_and_the_line_for_the_table(tmp_path):
    environ = {**os.environ, facts.FOLDER: str(tmp_path), facts.PART: "sweeps loss", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.visit.sweeps", "loss", "--quick"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = facts.read(tmp_path)
    trials = [fact for fact in found if fact["fact"] == "trial"]
    assert Counter(fact["kernel"] for fact in trials) == {"forward": 2, "forward + gradient": 2}
    assert all(fact["ms"] > 0 and fact["quick"] for fact in trials)
    (best,) = (fact for fact in found if fact["fact"] == "best")
    assert best["launch"] in {fact["launch"] for fact in trials}
    assert best["line"] == f"softcapped_cross_entropy.LAUNCHES: {best['launch']}"
    assert best["line"] in done.stdout


@pytest.mark.parametrize("name", TABLES)
def test_candidates_differ_and_fit_a_multiprocessor(name):
    table = TABLES[name]
    assert len(set(table.candidates)) == len(table.candidates) > 2
    for launch in table.candidates:
        if isinstance(launch, RowLaunch):
            assert launch.rows(512) * 512 == launch.tile
            assert all(32 * launch.num_warps * programs <= 2048 for programs in launch.resident)
        elif isinstance(launch, leaky_relu2_mlp.Launch):
            tiles = 2 * (launch.block_m + launch.block_n) * launch.block_k
            half = launch.block_m * launch.block_n  # bytes of half a tile on its way out, and of one of hidden
            for stages, halves in ((launch.up_stages, 1), (launch.gradient_stages, 2)):
                used = launch.resident * (stages * tiles + halves * half)
                assert used <= compiled_ahead.LARGEST_SHARED_BYTES, launch
        elif isinstance(launch, newton_schulz.Launch):
            used = 4 * launch.num_stages * launch.block * launch.block_k + 2 * launch.block**2
            assert used <= compiled_ahead.LARGEST_SHARED_BYTES, launch


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_as_before_even_after_an_exception(name):
    table = TABLES[name]
    before = dict(table.module.LAUNCHES)
    key = (0, *table.key) if table.key else 0
    assert key not in before

    def fail_inside():
        with sweeps.launched(table, table.candidates[-1], 0):
            entry = table.module.LAUNCHES[key]
            assert table.candidates[-1] == (entry if table.slot is None else entry[table.slot])
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail_inside()
    assert before == table.module.LAUNCHES


def measured(name, ratios):
    """A sweep whose trials took `ratios` {candidate: {launcher: time over that in use}}, 1 ms each in use."""
    table = TABLES[name]
    state = sweeps.Sweep(table, QUICK, 1.0, None)
    state.present_ms = {timed.name: 1.0 for timed in table.timed}
    state.ratios = {
        (candidate, timed.name): given.get(timed.name, given.get(""))
        for candidate, given in ratios.items()
        for timed in table.timed
    }
    return state


def line_of(state, candidates, capsys):
    state.tell(candidates)
    return capsys.readouterr().out.splitlines()[-1]


def test_the_best_is_put_together_by_kernel(capsys, monkeypatch):
    monkeypatch.delenv(facts.FOLDER, raising=False)
    present = leaky_relu2_mlp.LAUNCHES[90, 2]
    deep, flat = replace(present, up_stages=3, gradient_stages=2), replace(present, up_stages=2, gradient_stages=1)
    state = measured("leaky_relu2_mlp", {deep: {"up": 0.8, "gradient": 1.2}, flat: {"up": 1.1, "gradient": 0.9}})
    best, cost = state.best_of([deep, flat])
    assert (best.up_stages, best.gradient_stages) == (3, 1)
    assert cost == pytest.approx(17 * (0.8 + 0.9))
    assert repr(best) in line_of(state, [deep, flat], capsys)


def test_less_than_two_percent_keeps_what_is_in_use(capsys, monkeypatch):
    monkeypatch.delenv(facts.FOLDER, raising=False)
    other = replace(residual_rms_norm.LAUNCHES[90], tile=512)
    for ratio, kept in ((0.985, True), (0.97, False)):
        line = line_of(measured("residual_rms_norm", {other: {"": ratio}}), [other], capsys)
        assert ("tile=1024" in line) == kept


def test_a_candidate_that_failed_somewhere_is_not_chosen():
    other = replace(residual_rms_norm.LAUNCHES[90], tile=512)
    state = measured("residual_rms_norm", {other: {"": 0.5}})
    del state.ratios[other, "merge backward"]
    assert state.best_of([other])[0] == residual_rms_norm.LAUNCHES[90]


@compiles
def test_stages_are_in_the_machine_code():
    """Blocks loaded ahead lie in shared memory; what compiles them needs no GPU."""
    table = next(table for table in families(STATIC)["glue"]() if table.name == "residual_rms_norm")
    timed = next(timed for timed in table.timed if timed.name == "add forward")
    shared = {}
    with compiled_ahead.without_a_device():
        for stages in (1, 3):
            with sweeps.launched(table, replace(table.candidates[0], stages=stages), 0):
                (source,) = compiled_ahead.sources_of(lambda: timed.call(*timed.make()))
            found, why = compiled_ahead.compiled(source)
            assert not why
            shared[stages] = found.shared_bytes
    assert shared[3] >= shared[1] + 2 * 2 * 1024 * 2  # two blocks of both inputs, 1,024 values of bfloat16 each
