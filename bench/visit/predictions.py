"""What each figure of a visit was expected to be, before it was measured: `bench/predictions.json`."""

import json
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "predictions.json"


def predictions() -> dict[str, tuple[float, str]]:
    """{id of a figure, as report.py names it: (milliseconds on an H200, the reasoning in a line)}."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    return {name: (entry["ms"], entry["why"]) for name, entry in found.items()}


def predicted(name: str) -> tuple[float, str] | None:
    return predictions().get(name)
