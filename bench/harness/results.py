"""Measurements as files: one compact JSON a device, and the pages that are made from them.

    pytest bench/ --benchmark-json=new.json              # or bench/gpu.sh OUT, which leaves a folder
    python -m bench.harness.results collect new.json     # -> bench/results/<device>.json; or OUT, or several of them
    python -m bench.harness.results render [--check]     # -> bench/RESULTS.md and the table in README.md

Nothing here is typed by hand. `render --check` changes nothing and exits 1 when a page is out of date. A device that no
file is of is named as not measured. Needs the standard library only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.visit import report

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROW_FIELDS = ("operation", "case", "shape", "dtype", "backend", "median_ms", "bytes", "flops", "tokens", "others")
OPTIONAL_FIELDS = ("peak_mb",)  # on CUDA
SMALLER_UNITS = {"GB/s": "MB/s", "TFLOP/s": "GFLOP/s"}
README_DEVICES = {"amd-epyc-2-cores": "AMD EPYC, 2 cores", "nvidia-h200": "NVIDIA H200"}
CEILINGS = {
    "copy_gb_per_s": ("copy", "GB/s"),
    "float32_tflop_per_s": ("float32", "TFLOP/s"),
    "bfloat16_tflop_per_s": ("bfloat16", "TFLOP/s"),
}
VISITED = "nvidia-h200"  # what bench/predictions.json is for
RUN_ROWS = (
    "whole run of `train_gpt.py`",
    "its score before quantisation",
    "its score from the artifact alone",
    "the same with the causal n-gram cache",
    "general compressors on the same text",
)
README_ROWS = [  # (operation, case), and what a reader calls it
    ("pack_bits", "6 bits", "pack int6"),
    ("unpack_bits", "6 bits", "unpack int6"),
    ("unpack_dequantize", "6 bits", "unpack int6 and scale"),
    ("leaky_relu2_mlp", "forward + backward", "LeakyReLU² MLP, forward + backward"),
    ("softcapped_cross_entropy", "forward + backward", "soft-capped cross-entropy, forward + backward"),
    (
        "linear_softcapped_cross_entropy",
        "forward + backward",
        "head and soft-capped cross-entropy, forward + backward",
    ),
    ("leaky_relu2_mlp stack", "forward + backward", "stack of LeakyReLU² MLP blocks, forward + backward"),
    ("newton_schulz", "up", "Newton-Schulz, 5 steps"),
    ("gptq", "bank", "GPTQ int6 of a bank"),
    ("NgramCache.score", "adaptive", "causal n-gram cache, orders 2 to 7, one core"),
    ("training_step", "demo", "training step, preset `demo`"),
    ("training_step", "baseline", "training step, preset `baseline`, 1/8 of its batch"),
    ("write_artifact", "demo", "write the demo's artifact"),
]


class ResultsError(Exception):
    """A file is not what it should be; the message is one line."""


# From pytest-benchmark's JSON to ours


def collect(source: Path) -> dict[str, Any]:
    """The compact form of a pytest-benchmark JSON written by `pytest bench/ --benchmark-json`."""
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{source}: no JSON file of pytest-benchmark ({error})") from None
    if not isinstance(data, dict) or "pgolf" not in data:
        raise ResultsError(f"{source}: was not written by `pytest bench/ --benchmark-json`")
    machine, rows = data["pgolf"], []
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        missing = [name for name in ROW_FIELDS if name not in info]
        if missing:
            raise ResultsError(f"{source}: {benchmark['name']} has no {missing[0]}")
        row = {name: info[name] for name in (*ROW_FIELDS, *OPTIONAL_FIELDS) if name in info}
        rows.append(_short(priced(row, machine["ceilings"])))
    if not rows:
        raise ResultsError(f"{source}: holds no benchmark")
    return {
        "device": machine["name"],
        "slug": machine["slug"],
        **{
            name: machine[name]
            for name in ("kind", "detail", "cores", "date", "others_share", "command", "quick", "versions")
        },
        "ceilings": _short(machine["ceilings"]),
        "rows": rows,
    }


def priced(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """The row with its rate (tokens/s; or TFLOP/s or GB/s, by what takes longer at the ceilings) and its share of them.

    The share is the least possible time over the measured one: `bytes` at the copy bandwidth or `flops` at the matrix
    rate of the row's dtype, whichever is longer.
    """
    seconds = row["median_ms"] / 1e3
    by_bytes = row["bytes"] / ceilings.get("copy_gb_per_s", float("inf")) / 1e9
    by_flops = row["flops"] / ceilings.get(f"{row['dtype']}_tflop_per_s", float("inf")) / 1e12
    if row["tokens"]:
        rate, unit = row["tokens"] / seconds, "tokens/s"
    elif by_flops > by_bytes:
        rate, unit = row["flops"] / seconds / 1e12, "TFLOP/s"
    else:
        rate, unit = row["bytes"] / seconds / 1e9, "GB/s"
    return {**row, "rate": rate, "rate_unit": unit, "share_of_ceiling": max(by_bytes, by_flops) / seconds}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """One line a row, so that a difference between two versions can be read."""
    head = {name: value for name, value in results.items() if name != "rows"}
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in results["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def _short(value: Any) -> Any:
    """Four significant digits: more than any of these figures holds."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# From JSON to pages


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All devices, GPUs first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")))
        if found[-1]["quick"]:
            raise ResultsError(f"{path}: made with PGOLF_BENCH_QUICK, which measures nothing")
    return sorted(found, key=lambda results: (results["kind"] != "cuda", results["device"]))


def results_page(devices: list[dict[str, Any]]) -> str:
    lines = [
        "# Results",
        "",
        "Made by `python -m bench.harness.results render` from `bench/results/*.json`, which `pytest bench/` measured. "
        "Do not edit.",
        "",
        "Medians. *Ceiling* is the share of the least possible time by the device's own copy bandwidth and matrix "
        "product rate, measured in the same run, for the bytes and FLOPs that the operation cannot avoid. *Beside* "
        "compares with others in the same process, in alternation: 2x is twice as fast. `reference` is the operation's "
        "definition in plain PyTorch.",
    ]
    if any("peak_mb" in row for results in devices for row in results["rows"]):
        lines[-1] += " *Peak MB* is the most memory of the device that one call takes, its results included."
    for slug, name in README_DEVICES.items():
        if not any(results["slug"] == slug for results in devices):
            lines += ["", f"## {name}", "", "not measured"]
            if slug == VISITED:
                lines += ["", "### Predicted and measured", "", *report.figure_table({})]
    for results in devices:
        lines += ["", f"## {results['device']}", "", machine_line(results), ""]
        if results.get("run"):
            lines += [f"Whole run of train_gpt.py: {run_line(results['run'])}.", ""]
        if "visit" in results:
            lines += [*report.page(results["visit"]), ""]
        lines += table(results["rows"], markdown=True)
    return "\n".join(lines) + "\n"


def readme_table(devices: list[dict[str, Any]]) -> str:
    """What the devices of README_DEVICES measured, a column each; no column and no row without a figure."""
    by_slug = {results["slug"]: results for results in devices}
    labels = [*RUN_ROWS, *(label for _, _, label in README_ROWS)]
    columns = {name: _readme_column(by_slug[slug]) for slug, name in README_DEVICES.items() if slug in by_slug}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = []
    if columns:
        lines = [f"| operation | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        rows = zip(labels, zip(*columns.values(), strict=True), strict=True)
        lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows if any(cells)]
    missing = [name for name in README_DEVICES.values() if name not in columns]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines).strip()


def _readme_column(results: dict[str, Any]) -> list[str]:
    run = results.get("run") or {}
    cells = run_cells(run) if run.get("val_bpb_quantized") is not None else [""] * len(RUN_ROWS)
    return [*cells, *(_readme_cell(results, operation, case) for operation, case, _ in README_ROWS)]


def run_cells(run: dict[str, Any]) -> list[str]:
    """A run's summary as the cells of RUN_ROWS; "" for what it did not measure."""
    others = ", ".join(f"{name} {bpb:.3f}" for name, bpb in run["compressors_bpb"].items())
    return [
        f"`{run['preset']}`, {run['steps']:,} steps in {number(run['train_seconds'])} s",
        f"{run['val_bpb_float']:.4f} bpb",
        f"**{run['val_bpb_quantized']:.4f} bpb** in {number(run['artifact_bytes'] / 1e6)} MB",
        f"{run['val_bpb_ngram']:.4f} bpb" if run.get("val_bpb_ngram") else "",
        f"{others} bpb" if others else "",
    ]


def run_line(run: dict[str, Any]) -> str:
    """A run's summary in a line."""
    if run.get("val_bpb_quantized") is None:
        return "not measured"
    others = ", ".join(f"{name} {bpb:.3f}" for name, bpb in run["compressors_bpb"].items())
    cached = f"; {run['val_bpb_ngram']:.4f} with the causal n-gram cache" if run.get("val_bpb_ngram") else ""
    return (
        f"`{run['preset']}`, {run['steps']:,} steps in {number(run['train_seconds'])} s: "
        f"**{run['val_bpb_quantized']:.4f} bpb** in {number(run['artifact_bytes'] / 1e6)} MB "
        f"({run['val_bpb_float']:.4f} before quantisation{cached}; the same text: {others})"
    )


def _readme_cell(results: dict[str, Any], operation: str, case: str) -> str:
    """The fastest backend and dtype of a case; "" where there is none."""
    rows = [row for row in results["rows"] if (row["operation"], row["case"]) == (operation, case)]
    if not rows:
        return ""
    row = min(rows, key=lambda row: row["median_ms"])
    parts = [f"{number(row['median_ms'])} ms", rate(row), beside(row)]
    return f"{row['shape']} {row['dtype']}: {', '.join(part for part in parts if part)}"


def table(rows: list[dict[str, Any]], markdown: bool) -> list[str]:
    """A line a row; the column of memory only where a row knows it."""
    memory = ("peak MB",) if any("peak_mb" in row for row in rows) else ()
    header = ("operation", "case", "shape", "dtype", "backend", "ms", "rate", "ceiling", "beside", *memory)
    cells = [
        (
            row["operation"],
            row["case"],
            row["shape"],
            row["dtype"],
            row["backend"],
            number(row["median_ms"]),
            rate(row),
            f"{100 * row['share_of_ceiling']:.0f}%" if row["share_of_ceiling"] else "",
            beside(row),
            *(peak_memory(row) for _ in memory),
        )
        for row in rows
    ]
    if markdown:
        return [f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *cells)]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *cells)]


def machine_line(machine: dict[str, Any]) -> str:
    ceilings = machine.get("ceilings", {})
    parts = [f"{machine['detail']}, {machine['cores']} cores", f"measured {machine['date']}"]
    if machine["others_share"] is not None:
        parts.append(f"other processes took {100 * machine['others_share']:.0f}% of the CPUs")
    parts += [f"{name} {version}" for name, version in machine["versions"].items() if version != "not installed"]
    if ceilings:
        parts.append(
            "ceilings: "
            + ", ".join(
                f"{label} {number(ceilings[name])} {unit}"
                for name, (label, unit) in CEILINGS.items()
                if name in ceilings
            )
        )
    return "; ".join(parts)


def rate(row: dict[str, Any]) -> str:
    """The rate in a unit that suits it."""
    value, unit = row["rate"], row["rate_unit"]
    if value < 1 and unit in SMALLER_UNITS:
        value, unit = 1000 * value, SMALLER_UNITS[unit]
    return f"{number(value)} {unit}"


def beside(row: dict[str, Any]) -> str:
    return ", ".join(f"{number(other['times_faster'])}x {name}" for name, other in row["others"].items())


def peak_memory(row: dict[str, Any]) -> str:
    """MB that a call takes; in brackets what the others take."""
    if "peak_mb" not in row:
        return ""
    others = [f"{number(other['peak_mb'])} {name}" for name, other in row["others"].items() if "peak_mb" in other]
    return number(row["peak_mb"]) + (f" ({', '.join(others)})" if others else "")


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1.23, 123, 12,300."""
    return f"{float(f'{value:.3g}'):,.10g}"


def with_table(readme: str, new_table: str) -> str:
    """`readme` with what is between the markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ResultsError(f"README.md: needs the markers {BEGIN} and {END}, once each, in this order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{new_table}\n{END}{rest.partition(END)[2]}"


def render(root: Path, check: bool) -> list[str]:
    """Write the pages under `root`, or with `check` only look. Returns the names of those that were out of date."""
    devices = read_results(root / "bench" / "results")
    pages = {"bench/RESULTS.md": results_page(devices)}
    readme = root / "README.md"
    if readme.exists():
        pages["README.md"] = with_table(readme.read_text(encoding="utf-8"), readme_table(devices))
    stale = []
    for name, text in pages.items():
        path = root / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    return stale


# The program


def collect_all(sources: list[Path], run_summary: Path | None) -> dict[str, Any]:
    """Results of one pytest-benchmark JSON, or of the folders of a visit; with the summary of a training run."""
    if all(source.is_dir() for source in sources):
        try:
            results = report.collect(sources)
        except ValueError as error:
            raise ResultsError(str(error)) from None
        results["rows"] = [_short(priced(row, results["ceilings"])) for row in results["rows"]]
    elif len(sources) == 1:
        results = collect(sources[0])
    else:
        raise ResultsError(f"{len(sources)} files: one is accepted, or folders of bench/gpu.sh")
    if results["quick"]:
        raise ResultsError(f"{sources[0]}: made in quick mode (PGOLF_BENCH_QUICK, --quick), which measures nothing")
    if run_summary is not None:
        results["run"] = json.loads(run_summary.read_text(encoding="utf-8"))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Keep measurements and make the pages that show them.")
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="compact what was measured into one file a device")
    collecting.add_argument("source", type=Path, nargs="+", help="a pytest-benchmark JSON, or folders of bench/gpu.sh")
    collecting.add_argument("--folder", type=Path, default=ROOT / "bench" / "results", help="where to write it")
    collecting.add_argument("--run", type=Path, help="summary.json of a training run on the same device")
    rendering = commands.add_parser("render", help="make bench/RESULTS.md and the README's table")
    rendering.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    rendering.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "collect":
            results = collect_all(options.source, options.run)
            path = options.folder / f"{results['slug']}.json"
            write_results(path, results)
            print(f"{path}: {len(results['rows'])} rows")
            return 0
        stale = render(options.root, options.check)
        for name in stale:
            print(
                f"{name} is out of date; run `python -m bench.harness.results render`"
                if options.check
                else f"wrote {name}"
            )
        return int(options.check and bool(stale))
    except ResultsError as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
