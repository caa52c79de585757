"""What the figures of a visit were expected to be: bench/predictions.json, made before the first one by estimates.py.

A figure's id has its part's first word and its name: `ceilings/product up dW`, `step/loop fused`, `step/loop
fused/glue` for a class of its profile, `operations/OPERATION/CASE`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "predictions.json"


@lru_cache
def predictions() -> dict[str, tuple[float, str]]:
    """{id: (milliseconds on an H200, the reasoning in a line)}."""
    return {name: (entry["ms"], entry["why"]) for name, entry in json.loads(FILE.read_text(encoding="utf-8")).items()}


def measured(fact: dict[str, Any]) -> dict[str, float]:
    """The figures of a fact of a visit: {id: milliseconds}, empty for one that has none."""
    kind, _, rest = fact["part"].partition(" ")
    name = fact["fact"]
    if name == "row":
        return {f"operations/{fact['operation']}/{fact['case']}": fact["median_ms"]}
    if kind == "step" and name == "step":
        return {f"step/{rest}": fact["ms"]}
    if kind == "step" and name == "profile":
        return {f"step/{rest}/{part}": row["ms"] for part, row in fact["classes"].items()}
    if kind == "ceilings" and "ms" in fact:
        return {f"ceilings/{name}": fact["ms"]}
    return {}
