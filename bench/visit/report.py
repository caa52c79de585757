"""From a visit's facts to results: what was measured beside what was predicted, and what was not reached.

Figures have ids: "ceilings/copy", "step/loop fused", "step/loop fused/attention", "operations/newton_schulz/up".
`bench/predictions.json` names them as they are here.
"""

from pathlib import Path
from typing import Any

from bench.visit import facts
from bench.visit.predictions import measured, predictions

OFF = 1.3  # a figure that misses its prediction by more is marked
COPY, SQUARE = "ceilings/copy", "ceilings/product 8192"


def collect(folders: list[Path]) -> dict[str, Any]:
    """The results of a device from one visit or several, later ones over earlier ones.

    ValueError where there is no fact that says which device it was.
    """
    found = [fact for folder in folders for fact in facts.read(folder)]
    device = last(found, "device")
    if device is None:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no fact tells the device; the part `machine` was not reached"
        )
    begun = [fact for fact in found if fact["fact"] == "begun"]
    return {
        "device": device["name"],
        **{name: device[name] for name in ("slug", "kind", "detail", "cores", "date", "versions")},
        "others_share": None,
        "command": "bench/gpu.sh",
        "quick": any(fact["quick"] for fact in begun),
        "ceilings": ceilings(found),
        "visit": {
            "seconds": [fact["seconds"] for fact in begun],
            "parts": parts(found),
            "tests": tests(found),
            "figures": figures(found),
            "errors": errors(found),
            "sweeps": [_without(fact, "second") for fact in found if fact["fact"].startswith("best")],
        },
        "rows": rows(found),
    }


def last(found: list[dict], name: str) -> dict | None:
    return next((fact for fact in reversed(found) if fact["fact"] == name), None)


def figures(found: list[dict]) -> dict[str, float]:
    """Milliseconds by id, the last of each."""
    return {name: ms for fact in found for name, ms in measured(fact).items()}


def ceilings(found: list[dict]) -> dict[str, float]:
    """As `bench.harness.device.measure_ceilings` names them; without what was not reached."""
    answer = {}
    for fact in found:
        if fact["part"].startswith("ceilings") and "ms" in fact:
            if fact["fact"] == "copy":
                answer["copy_gb_per_s"] = 1e3 * fact["tbytes_per_s"]
            elif fact["fact"] == "product 8192":
                answer["bfloat16_tflop_per_s"] = fact["tflop_per_s"]
    return answer


def rows(found: list[dict]) -> list[dict[str, Any]]:
    """Of the benchmarks, the last of each case."""
    kept = {(f["operation"], f["case"], f["dtype"], f["backend"]): f for f in found if f["fact"] == "row"}
    return [_without(fact, "part", "fact", "second") for fact in kept.values()]


def parts(found: list[dict]) -> list[dict[str, Any]]:
    """How each part ended, the last time that it was begun."""
    kept = {fact["part"]: fact for fact in found if fact["fact"] == "ended"}
    return [_without(fact, "fact", "second") for fact in kept.values()]


def tests(found: list[dict]) -> dict[str, Any]:
    """{"passed", "failed", "skipped", "died": counts, "not": [the tests that did not pass, each with its reason]}."""
    kept = {fact["fact"]: fact for fact in found if fact["part"].startswith("correctness") and "outcome" in fact}
    outcomes = [fact["outcome"] for fact in kept.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped", "died")}
    wrong = [
        f"{name}: {fact['outcome']}: {fact['why']}"
        for name, fact in kept.items()
        if fact["outcome"] in ("failed", "died")
    ]
    return {**counts, "not": wrong}


def errors(found: list[dict]) -> list[str]:
    return [f"{fact['part']}: {fact['fact']}: {fact['error']}" for fact in found if "error" in fact]


def _without(fact: dict, *names: str) -> dict:
    return {name: value for name, value in fact.items() if name not in names}


# The page


def page(visit: dict[str, Any]) -> list[str]:
    """Sections of RESULTS.md: how the visit went, figures beside predictions, launch tables."""
    states = visit["parts"]
    unfinished = [f"{part['part']} ({part['state']})" for part in states if part["state"] != "ok"]
    known = visit["tests"]
    seconds = " + ".join(f"{each:g}" for each in visit["seconds"])
    lines = [
        f"A visit of {seconds} s: {len(states)} parts; not finished: {', '.join(unfinished) or 'none'}.",
        "",
        f"GPU tests: {known['passed']} passed, {known['failed']} failed, {known['died']} ended their process, "
        f"{known['skipped']} skipped.",
    ]
    lines += [f"- {line}" for line in (*known["not"], *visit["errors"])]
    lines += ["", "### Predicted and measured", "", *figure_table(visit["figures"])]
    if visit["sweeps"]:
        lines += ["", "### Launch parameters", ""]
        lines += [f"- {' '.join(f'{name}={value}' for name, value in fact.items())}" for fact in visit["sweeps"]]
    return lines


def figure_table(found: dict[str, float]) -> list[str]:
    """Milliseconds of every prediction and every figure; those that were not reached say so."""
    expected = predictions()
    lines = ["| figure | predicted ms | measured ms | measured / predicted | reasoning |", "|---|---|---|---|---|"]
    for name in dict.fromkeys([*expected, *found]):
        ms, why = expected.get(name, (None, ""))
        took = found.get(name)
        ratio = took / ms if took is not None and ms else None
        mark = "**" if ratio is not None and not 1 / OFF <= ratio <= OFF else ""
        cells = (
            name,
            "" if ms is None else f"{ms:.4g}",
            "not reached" if took is None else f"{took:.4g}",
            "" if ratio is None else f"{mark}{ratio:.2f}{mark}",
            why,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines
