"""The page a run leaves behind: `report.html`, one self-contained file that opens with no network.

It is made from what the run wrote (`settings.json`, `summary.json`, `metrics.jsonl`) and from nothing else, so it can
be made again at any time. A value that a run did not get to is shown as missing.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pgolf.errors import UserError
from pgolf.runtime.files import replacing
from pgolf.settings import PRESETS, Settings

LARGEST = 1e18  # a number beyond this is no measurement
# Fields of the summary that have a place of their own on the page; every other one is a line of "The run".
PLACED = {
    "run_id", "interrupted", "bytes_by_role", "seconds", "compressors_bpb", "backends", "fallbacks", "versions",
    "attention", "compile", "cuda_graphs", "dtype", "val_bpb_quantized", "val_bpb_float", "total_bytes", "budget_bytes",
    "fits_budget", "artifact_bytes", "code_bytes", "max_wallclock_seconds", "wallclock_used_seconds",
    "within_wallclock",
}  # fmt: skip

UNITS = {"_seconds": " s", "_ms": " ms", "tflop_per_s": " TFLOP/s"}
OF_ONE_RUN = {"run_id", "out_dir", "resume"}  # settings that no preset has
ENDS = {
    "interrupted": "This run was interrupted: what it did not get to is missing below.",
    "aborted": "This run was ended by its early validation, which was worse than ABORT_BPB.",
    "diverged": "This run diverged: its loss or its weights are not finite, and there is no artifact.",
}


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into `run_folder` and return its path. A `UserError` names a missing summary."""
    folder = Path(run_folder)
    summary = _read_summary(folder / "summary.json")
    settings, notices = _read_settings(folder / "settings.json")
    train, validation, trouble = read_metrics(folder / "metrics.jsonl")
    notices = [text for name, text in ENDS.items() if summary.get(name)] + notices
    usual = changed_settings(settings)
    settings = {name: settings[name] for name in [*usual, *(name for name in settings if name not in usual)]}
    page = _environment().from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    html = page.render(
        run_id=as_text(summary.get("run_id")) or folder.resolve().name,
        notices=notices + trouble,
        headline=headline(summary),
        loss=_loss(train, validation),
        quality=_quality(summary),
        budget=byte_table(summary),
        time=_time(summary),
        facts={name: measured(name, value) for name, value in summary.items() if name not in PLACED},
        settings={name: as_text(value) for name, value in settings.items()},
        usual={name: as_text(value) for name, value in usual.items()},
        backends={op: as_text(name) for op, name in table(summary.get("backends")).items()},
        fallbacks=[as_text(name) for name in _list(summary.get("fallbacks"))],
        machinery={name: as_text(summary.get(name)) for name in ("attention", "compile", "cuda_graphs", "dtype")},
        versions={name: as_text(version) for name, version in table(summary.get("versions")).items()},
    )
    path = folder / "report.html"
    with replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))  # an environment variable can bring in halves of surrogate pairs
    return path


def number(value: Any) -> float | int | None:
    """`value` if it is a finite number, else None: a stopped run leaves nulls and a diverged one NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST and math.isfinite(value) else None


def table(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """A setting or a measurement as a person reads it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def measured(name: str, value: Any) -> str:
    """A field of the summary as a person reads it, with its unit."""
    if number(value) is None:
        return as_text(value)
    if name.endswith("memory_bytes"):
        return f"{value / 1e6:,.0f} MB" if value < 1e10 else f"{value / 1e9:,.1f} GB"
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    return f"{as_text(value)}{unit}"


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the settings that are not as their preset has them: what the preset has."""
    name = settings.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return {}
    preset = Settings(**{"preset": name, **PRESETS[name]}).model_dump()
    return {
        name: preset[name]
        for name, value in settings.items()
        if name in preset and name not in OF_ONE_RUN and value != preset[name]
    }


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: name the folder of a run, such as runs/<run_id>")
    value = _read_object(path)
    if value is None:
        raise UserError(f"{path} is damaged: it must hold one JSON object, as a run writes it")
    return value


def _read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings and what there is to say about their file."""
    value = _read_object(path) if path.is_file() else None
    if value is None:
        return {}, [f"{path.name} is {'damaged' if path.is_file() else 'missing'}: no settings are shown."]
    return value, []


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Training records and validation records in order of their steps, and what was wrong with the file.

    A resumed run repeats the steps since its checkpoint; the later record of a step counts.
    """
    if not path.is_file():
        return [], [], [f"{path.name} is missing: there is no loss curve."]
    records: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "val": {}}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = table(json.loads(line))
        except (ValueError, RecursionError):
            record = {}
        step = number(record.get("step"))
        if step is not None and record.get("kind") in records:
            records[record["kind"]][step] = record
        elif line.strip():
            unreadable += 1
    trouble = []
    if unreadable:
        trouble = [f"{path.name}: {unreadable} unreadable line{'s' if unreadable > 1 else ''} left out."]
    train, validation = ([by_step[step] for step in sorted(by_step)] for by_step in records.values())
    return train, validation, trouble


def headline(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The three figures that decide a run, each a dict of title, value, note and state ("good", "bad" or "")."""
    before, after = number(summary.get("val_bpb_float")), number(summary.get("val_bpb_quantized"))
    if after is None:
        quality = {"value": "" if before is None else f"{before:.4f}", "note": "not scored from the artifact"}
        quality["note"] = "before quantisation; " * (before is not None) + quality["note"]
    else:
        note = "float not scored" if before is None else f"{before:.4f} before quantisation ({after - before:+.4f})"
        quality = {"value": f"{after:.4f}", "note": note}

    total, budget = number(summary.get("total_bytes")), number(summary.get("budget_bytes"))
    size = {"value": "" if total is None else f"{total:,}", "note": "the budget is not recorded", "state": ""}
    if budget is not None:
        size["note"] = f"of {budget:,}"
    if total is not None and budget is not None:
        fits = total <= budget and summary.get("fits_budget") is not False
        size["state"] = "good" if fits else "bad"
        size["note"] = (
            f"fits: {budget - total:,} left of {budget:,}"
            if fits
            else f"does not fit: {total - budget:,} over {budget:,}"
        )

    used, limit = number(summary.get("wallclock_used_seconds")), number(summary.get("max_wallclock_seconds"))
    clock = {"value": "" if used is None else f"{used:,.1f} s", "note": "no limit recorded", "state": ""}
    if limit is not None:
        clock["note"] = f"of {as_text(limit)} s"
        within = summary.get("within_wallclock")
        if isinstance(within, bool):
            clock["state"] = "good" if within else "bad"
            clock["note"] = f"{'within' if within else 'over'} the limit of {as_text(limit)} s"
    return [
        {"title": "Bits per byte", "state": "", **quality},
        {"title": "Bytes, code and weights", **size},
        {"title": "Wall clock of training", **clock},
    ]


def _loss(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The loss curve and a sentence on its end; None without a point to draw."""
    timed = all(number(record.get("train_seconds")) is not None for record in train + validation)
    axis = "train_seconds" if timed else "step"
    points = {
        name: [(record[axis], record[name]) for record in records if number(record.get(name)) is not None]
        for name, records in (("train_loss", train), ("val_loss", validation))
    }
    if not any(points.values()):
        return None
    from pgolf.run import figures  # matplotlib takes most of a second to import; `import pgolf.run.report` should not

    words = ""
    if points["val_loss"]:
        last = next(record for record in reversed(validation) if number(record.get("val_loss")) is not None)
        bpb = number(last.get("val_bpb"))
        words = f"Last validation, at step {last['step']:,}: {last['val_loss']:.4f} nats per token"
        words += f", {bpb:.4f} bits per byte." if bpb is not None else "."
    label = "seconds of training" if timed else "step"
    return {"svg": _markup(figures.loss_curve(points["train_loss"], points["val_loss"], label)), "words": words}


def _quality(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of bits per byte, the model's and the general compressors'; None when nothing was scored."""
    rows = []
    for field, title in (
        ("val_bpb_ngram", "after quantisation, with n-gram cache"),
        ("val_bpb_quantized", "after quantisation"),
        ("val_bpb_float", "before quantisation"),
    ):
        if (value := number(summary.get(field))) is not None:
            rows.append((title, value, f"{value:.4f}", "accent"))
    for name, bpb in table(summary.get("compressors_bpb")).items():
        if (value := number(bpb)) is not None:
            rows.append((name, value, f"{value:.4f}", "other"))
    if not rows:
        return None
    from pgolf.run import figures

    label = "Bits per byte: " + ", ".join(f"{title} {text}" for title, _, text, _ in rows)
    return {"svg": _markup(figures.bars("quality", figures.plain(label), rows))}


def byte_table(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Every byte of the budget: drawing, rows of (role, bytes, share, colour variable), sum and what is left."""
    sizes = {role: number(size) for role, size in table(summary.get("bytes_by_role")).items() if role != "left"}
    segments = [(role, int(size)) for role, size in sizes.items() if size is not None]
    total, budget = number(summary.get("total_bytes")), number(summary.get("budget_bytes"))
    if not segments:
        if total is None:
            return None
        segments = [("total", int(total))]
    used = sum(size for _, size in segments)
    from pgolf.run import figures

    def share(size: float) -> str:
        return f"{100 * size / budget:.2f} %" if budget else ""

    return {
        "svg": _markup(figures.byte_budget("bytes", segments, None if budget is None else int(budget))),
        "zoom": _zoom(segments, used, budget),
        "rows": [(role, f"{size:,}", share(size), figures.role_colour(role)) for role, size in segments],
        "used": (f"{used:,}", share(used)),
        "left": None if budget is None else (f"{budget - used:,}", share(budget - used)),
        "budget": None if budget is None else f"{budget:,}",
        "over": budget is not None and used > budget,
        "artifact": as_text(number(summary.get("artifact_bytes"))),
        "code": as_text(number(summary.get("code_bytes"))),
    }


def _zoom(segments: list[tuple[str, int]], used: int, budget: float | None) -> dict[str, Any] | None:
    """The used bytes alone, where they are a small part of the bar of the budget."""
    if not budget or not 0 < used < budget / 2:
        return None
    from pgolf.run import figures

    return {"svg": _markup(figures.byte_budget("used-bytes", segments, None)), "times": f"{budget / used:.3g}"}


def _time(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of seconds by phase in the order in which they ran, and their total; None when none was recorded."""
    phases = {name: number(value) for name, value in table(summary.get("seconds")).items()}
    total = phases.pop("total", None)
    rows = [(name, value, f"{value:,.1f} s", "accent") for name, value in phases.items() if value is not None]
    if not rows:
        return None
    from pgolf.run import figures

    label = "Seconds: " + ", ".join(f"{name} {value:,.1f}" for name, value, _, _ in rows)
    words = "" if total is None else f"{total:,.1f} s from start to end."
    return {"svg": _markup(figures.bars("seconds", figures.plain(label), rows)), "words": words}


def _markup(drawings: dict[str, str]) -> dict[str, Markup]:
    """The drawings as markup that the template does not escape; their texts were escaped when they were drawn."""
    return {width: Markup(svg) for width, svg in drawings.items()}


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
