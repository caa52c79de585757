"""Every figure that a visit brings home was predicted: positive, with a reason, under the id of its fact."""

import json
import re

import pytest

from bench import bench_glue, bench_newton_schulz
from bench.step_model.profile import NAMES
from bench.visit import ceilings, plan
from bench.visit.predictions import FILE, measured, predictions

PARTS = ("ceilings", "step", "operations")


def figure_of(fact: dict) -> str:
    (name,) = measured(fact)
    return name


def rows_on_cuda():
    """Operation and case of each row, as the benchmarks name them there."""
    for case, (operation, *_) in bench_glue.CASES.items():
        yield from ((operation, f"{case}, {direction}") for direction in ("forward", "forward + backward"))
    for case in bench_newton_schulz.CASES:
        yield from (("newton_schulz", case), ("newton_schulz", f"{case}, quintic"))
    both = ("forward", "forward + backward")
    yield from (("leaky_relu2_mlp", case) for case in (*both, "relu², forward + backward"))
    yield from (("softcapped_cross_entropy", case) for case in both)
    yield "linear_softcapped_cross_entropy", "forward + backward"
    yield "leaky_relu2_mlp stack", "forward + backward"
    yield from (("unpack_dequantize", f"{bits} bits") for bits in (4, 6, 8))


def test_predictions_are_positive_and_give_one_line_of_reasons():
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    assert len(entries) > 80
    for figure, entry in entries.items():
        assert set(entry) == {"ms", "why"}, figure
        assert 0 < entry["ms"] < 1000, figure
        assert entry["why"].isprintable(), figure
        assert re.search(r"\d", entry["why"]), f"{figure}: no arithmetic"
        assert figure.split("/", 1)[0] in PARTS
        assert figure.strip() == figure
        assert predictions()[figure] == (entry["ms"], entry["why"])


@pytest.mark.parametrize(("operation", "case"), list(rows_on_cuda()))
def test_every_row_of_the_benchmarks_has_one(operation, case):
    fact = {"part": f"operations {operation}", "fact": "row", "operation": operation, "case": case, "median_ms": 1.0}
    assert figure_of(fact) in predictions()


def test_every_ceiling_has_one():
    names = {"copy", "product 8192", "host launch torch", "host launch newton_schulz, 5 steps"}
    names |= {f"product {name} {way}" for name in ceilings.PRODUCTS for way in ("forward", "dX", "dW")}
    names |= {f"attention varlen {heads} heads {way}" for heads in (4, 8) for way in ("forward", "backward")}
    missing = [name for name in names if figure_of({"part": "ceilings", "fact": name, "ms": 1.0}) not in predictions()]
    assert not missing


def test_every_step_of_the_plan_has_one_and_its_classes_are_those_of_the_profile():
    steps = [part.name for part in plan.plan(quick=False, cuda=True) if part.kind == "step" and not part.asked_for]
    steps = [name for name in steps if "peer" not in name]
    assert len(steps) == 5
    for name in steps:
        figure = figure_of({"part": name, "fact": "step", "ms": 1.0})
        assert figure in predictions()
        classes = {known.removeprefix(f"{figure}/") for known in predictions() if known.startswith(f"{figure}/")}
        assert classes <= set(NAMES)
        assert "graphs" in name or classes == {"products", "glue", "attention", "MLP", "loss", "optimiser"}


def test_what_is_no_figure_has_no_id():
    assert measured({"part": "step loop plain", "fact": "compiled", "seconds": 1.0}) == {}
    assert measured({"part": "ceilings", "fact": "attention flash3", "error": "not here"}) == {}


def test_a_profile_has_a_figure_for_each_class():
    fact = {"part": "step first fused", "fact": "profile", "classes": {"MLP": {"ms": 9.5, "launches": 22}}}
    assert measured(fact) == {"step/first fused/MLP": 9.5}
