"""A training step of a preset, operation by operation: bytes, FLOPs and the least time on an H100 and an H200.

    python -m bench.step_model.step_model [--preset record] [--tokens N] [--gpus 8] [--kernels] [--json [FILE]]

Three times. "plain": Inductor's own fusions for Hopper, read without a GPU (compiled_step.py), of the model's plain
functions; "fused": the same with this package's operations between the matrix products (FUSED_GLUE=on); "least": with
everything there in one kernel a pass, by formulas (fused_glue.py). Then what could still be saved and is not built
(savings.py). N tokens on each GPU; by default the preset's batch over the GPUs. Before depth recurrence starts
("pre-loop"; the only phase of a preset without loops) and after ("loop"). A trace takes up to half a minute of CPU
time; as many run side by side as the process may use cores.

The least time of a kernel is the larger of bytes over bandwidth and FLOPs over the peak (static_report.py), of a step
the sum over its kernels, with nothing overlapped and no time between kernels. No device reaches it.

Products are counted at 2 FLOPs a multiplication. Attention: half of a full row of TRAIN_SEQ_LEN, two products forward
and five backward; documents are shorter, so this is the most. Work element by element counts no FLOPs. The optimiser
and communication are this package's, by formulas (operations.py). A kernel that serves several regions is counted
in the first that fits (regions.py), so of the plain step the mixes hold most of the sum of x0's gradients; sums
over regions do not depend on that.
"""

import argparse
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.kernels.static_report import BANDWIDTH, PEAK_FLOPS
from bench.step_model.compiled_step import Kernel, compiled_kernels
from bench.step_model.fused_glue import REGIONS
from bench.step_model.operations import (
    NVLINK,
    Operation,
    has_one_product,
    least_operations,
    operations_of,
    optimiser_operations,
    total_bytes,
    totals,
)
from bench.step_model.regions import CLASSES, GLUE, OTHER
from bench.step_model.savings import L2_BYTES, PROCESSORS, Chunks, Saving, mlp_chunks, savings
from pgolf.errors import PgolfError, UserError
from pgolf.model import ModelConfig
from pgolf.model.execution import FUSABLE
from pgolf.runtime.host import cores
from pgolf.settings import Settings, load_settings

# Of a step on 8xH100 SXM with the preset's own batch, from the entries' train logs; of pr1855 by #1787, the nearest.
MEASURED_MS = {
    "baseline": {"pre-loop": 43.5},
    "pr66": {"pre-loop": 64.3},
    "pr1493": {"pre-loop": 102.0, "loop": 151.0},
    "pr1855": {"pre-loop": 95.9, "loop": 140.5},
    "record": {"pre-loop": 95.1, "loop": 139.5},
}
SIDES = ("plain", "fused", "least")


@dataclass(frozen=True)
class Phase:
    """A step before depth recurrence starts, or after."""

    name: str
    layers: int
    plain: list[Operation]
    fused: list[Operation]
    least: list[Operation]
    measured_ms: float | None = None  # by others, of the same batch
    savings: list[Saving] = field(default_factory=list)  # from `fused`
    chunks: Chunks | None = None  # the MLP's, of the first of them

    def sides(self) -> dict[str, list[Operation]]:
        return {side: getattr(self, side) for side in SIDES}

    def ratio(self, side: str, parts: tuple[str, ...] = CLASSES[:-1]) -> float:
        """Bytes over the plain step's."""
        return total_bytes(getattr(self, side), parts) / total_bytes(self.plain, parts)

    def regions(self) -> list[dict]:
        """Of the glue, by what our operations save, largest first."""
        rows = []
        for region in (*REGIONS, OTHER):
            own = {side: [o for o in operations if o.region == region] for side, operations in self.sides().items()}
            if any(own.values()):
                rows.append({"region": region, **_region(own)})
        return sorted(rows, key=lambda row: -row["saved_bytes"])

    def unbuilt(self) -> dict:
        """The step with all that is not built."""
        now = totals(self.fused)
        size = now["bytes"] - sum(saving.bytes_moved for saving in self.savings)
        times = {f"{d}_ms": now[f"{d}_ms"] - sum(s.milliseconds[d] for s in self.savings) for d in BANDWIDTH}
        return {"bytes": size, "bytes_ratio": size / totals(self.plain)["bytes"], **times}

    def as_dict(self) -> dict:
        return {
            "layers": self.layers,
            "measured_ms": self.measured_ms,
            "bytes_ratio": {side: self.ratio(side) for side in SIDES[1:]},
            "glue_bytes_ratio": {side: self.ratio(side, GLUE) for side in SIDES[1:]},
            "regions": self.regions(),
            "not_built": {
                "savings": [saving.__dict__ for saving in self.savings],
                "mlp_chunks": self.chunks and self.chunks.__dict__,
                "total": self.unbuilt(),
            },
            **{side: {"total": totals(operations), "classes": {part: totals(operations, (part,)) for part in CLASSES},
                      "operations": [o.as_dict() for o in sorted(operations, key=lambda o: -o.milliseconds("h100"))]}
               for side, operations in self.sides().items()},
        }  # fmt: skip


def _region(own: dict[str, list[Operation]]) -> dict:
    sizes = {side: total_bytes(operations) for side, operations in own.items()}
    saved = sizes["plain"] - sizes["fused"]
    return {
        **{f"{side}_kernels": sum(o.count for o in operations) for side, operations in own.items()},
        **{
            f"{side}_{pass_}_bytes": sum(o.count * o.bytes_moved for o in operations if o.backward == back)
            for side, operations in own.items()
            for back, pass_ in enumerate(("forward", "backward"))
        },
        "saved_bytes": saved,
        **{f"saved_{device}_ms": 1e3 * saved / bandwidth for device, bandwidth in BANDWIDTH.items()},
    }


def side_by_side(function: Callable, jobs: list[tuple]) -> list:
    """Results in the order of the jobs, from as many processes as this one may use cores."""
    processes = min(len(jobs), cores())
    if processes == 1:
        return [function(*job) for job in jobs]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


def make_phases(settings: Settings, tokens: int, gpus: int) -> list[Phase]:
    config = ModelConfig.of(settings)
    names = {False: "pre-loop", True: "loop"} if config.num_loops else {False: "pre-loop"}
    packed = settings.loader == "documents"
    jobs = [
        (config, looping, tokens, settings.train_seq_len, packed, fused)
        for looping in reversed(names)  # the longest first
        for fused in (frozenset(), FUSABLE)
    ]
    traces = side_by_side(compiled_kernels, jobs)
    pairs = {looping: (traces.pop(0), traces.pop(0)) for looping in reversed(names)}
    alike = gpus == 8 and tokens * gpus == settings.train_batch_tokens
    measured = MEASURED_MS.get(settings.preset, {}) if alike else {}
    rest = optimiser_operations(config, settings, gpus)
    return [
        make_phase(name, settings, tokens, looping, *pairs[looping], rest, measured.get(name))
        for looping, name in names.items()
    ]


def make_phase(
    name: str,
    settings: Settings,
    tokens: int,
    looping: bool,
    plain_kernels: list[Kernel],
    fused_kernels: list[Kernel],
    rest: list[Operation],  # of the step, the same whatever the kernels
    measured_ms: float | None,
) -> Phase:
    config = ModelConfig.of(settings)
    plain, fused = (operations_of(k, settings.train_seq_len) + rest for k in (plain_kernels, fused_kernels))
    one_product = has_one_product(fused_kernels, config)
    least = least_operations(fused, config, looping, tokens, one_product)
    return Phase(
        name,
        len(config.visits(looping)),
        plain,
        fused,
        least,
        measured_ms,
        savings(fused, least, config, looping, tokens, one_product),
        mlp_chunks(config, looping, tokens),
    )


def steps_in_budget(phases: list[Phase], settings: Settings, milliseconds: dict[str, float]) -> int:
    """Whole steps in the training budget, the calibration's share kept back; loops start at ENABLE_LOOPING_AT of it."""
    seconds = settings.max_wallclock_seconds - settings.gptq_reserve_seconds
    shares = [settings.enable_looping_at, 1 - settings.enable_looping_at] if len(phases) == 2 else [1.0]
    return int(
        sum(1e3 * seconds * share / milliseconds[phase.name] for phase, share in zip(phases, shares, strict=True))
    )


def budgets(phases: list[Phase], settings: Settings) -> dict[str, int]:
    """Steps by what one is taken to last. `measured`: on H100s, also less what fusing takes from the least time."""
    answer = {}
    for device in BANDWIDTH:
        for side in SIDES:
            times = {phase.name: totals(phase.sides()[side])[f"{device}_ms"] for phase in phases}
            answer[f"{device} least time, {side}"] = steps_in_budget(phases, settings, times)
    measured = {phase.name: phase.measured_ms for phase in phases if phase.measured_ms is not None}
    if len(measured) == len(phases):
        saved = {p.name: totals(p.plain)["h100_ms"] - totals(p.fused)["h100_ms"] for p in phases}
        answer["measured"] = steps_in_budget(phases, settings, measured)
        less = {name: measured[name] - saved[name] for name in saved}
        answer["measured less what fusing saves"] = steps_in_budget(phases, settings, less)
    return answer


def text_report(phases: list[Phase], settings: Settings, tokens: int, gpus: int, kernels: bool) -> list[str]:
    lines = [f"{settings.preset}: {tokens} tokens on each of {gpus} GPUs, bfloat16; {' | '.join(SIDES)}"]
    for phase in phases:
        measured = "" if phase.measured_ms is None else f"; measured on 8xH100: {phase.measured_ms} ms"
        lines += ["", f"{phase.name}: {phase.layers} layers run{measured}", ""]
        lines += table([CLASS_HEADER, *(class_row(phase, part) for part in (*CLASSES, "all"))])
        lines += ["", "glue by region, where our operations save most first:", ""]
        lines += table([REGION_HEADER, *map(region_row, phase.regions())])
        lines += ["", *(ratio_line(phase, side) for side in SIDES[1:])]
        lines += ["", "not built, from the fused step, each after those above it; floors:", "", *unbuilt_lines(phase)]
        if kernels:
            lines += ["", *table([OPERATION_HEADER, *map(operation_row, phase.as_dict()["fused"]["operations"])])]
    lines += ["", f"steps in {settings.max_wallclock_seconds:g} s, {settings.gptq_reserve_seconds:g} kept back:", ""]
    return [*lines, *table([[name, str(steps)] for name, steps in budgets(phases, settings).items()])]


CLASS_HEADER = ["class", "kernels", "TFLOP", "GB", "H100 ms", "H200 ms"]
REGION_HEADER = ["region", "kernels", "GB forward", "GB backward", "fused saves GB", "H100 ms", "H200 ms"]
UNBUILT_HEADER = ["", "saves GB", "H100 ms", "H200 ms", "then GB", "of plain"]
OPERATION_HEADER = ["operation", "class", "pass", "count", "MB each", "GFLOP each", "H100 ms", "H200 ms"]


def class_row(phase: Phase, part: str) -> list[str]:
    parts = CLASSES if part == "all" else (part,)
    sums = [totals(operations, parts) for operations in phase.sides().values()]
    units = {"flops": 1e12, "bytes": 1e9, "h100_ms": 1, "h200_ms": 1}
    numbers = [_three([s[name] / unit for s in sums]) for name, unit in units.items()]
    return [part, _three([s["kernels"] for s in sums]), *numbers]


def region_row(row: dict) -> list[str]:
    sizes = [_three([row[f"{side}_{pass_}_bytes"] / 1e9 for side in SIDES]) for pass_ in ("forward", "backward")]
    saved = (row["saved_bytes"] / 1e9, *(row[f"saved_{device}_ms"] for device in BANDWIDTH))
    return [row["region"], _three([row[f"{side}_kernels"] for side in SIDES]), *sizes, *(f"{x:.2f}" for x in saved)]


def _three(numbers: list) -> str:
    return " | ".join(f"{x:4d}" if isinstance(x, int) else f"{x:6.2f}" for x in numbers)


def ratio_line(phase: Phase, side: str) -> str:
    return f"{side}: {phase.ratio(side):.3f} of the plain step's bytes, {phase.ratio(side, GLUE):.3f} of its glue's"


def unbuilt_lines(phase: Phase) -> list[str]:
    left, before = totals(phase.fused)["bytes"], totals(phase.plain)["bytes"]
    rows = [UNBUILT_HEADER]
    for saving in phase.savings:
        left -= saving.bytes_moved
        times = [f"{round(saving.milliseconds[device], 2) + 0.0:.2f}" for device in BANDWIDTH]
        rows.append(
            [saving.name, f"{saving.bytes_moved / 1e9:.2f}", *times, f"{left / 1e9:.2f}", f"{left / before:.3f}"]
        )
    end = phase.unbuilt()
    lines = table(rows)
    if phase.chunks:
        lines += ["", chunks_line(phase.chunks)]
    times = f"{end['h100_ms']:.1f} ms on H100s, {end['h200_ms']:.1f} on H200s"
    lines += [f"With all of these: {end['bytes'] / 1e9:.1f} GB, {end['bytes_ratio']:.3f} of plain; least time {times}."]
    return lines


def chunks_line(chunks: Chunks) -> str:
    return (
        f"MLP in chunks of {chunks.tokens} tokens: {chunks.live_bytes / 1e6:.0f} of {L2_BYTES / 1e6:.0f} MB of L2 alive"
        f" backward, tiles fill {chunks.fill:.2f} of {PROCESSORS} SMs, {chunks.launches} products for"
        f" {chunks.launches_today}, each {chunks.product_us:.1f} us at the peak."
    )


def operation_row(row: dict) -> list[str]:
    each = [f"{row['bytes_moved'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}"]
    times = [f"{row[f'{device}_ms']:.3f}" for device in BANDWIDTH]
    return [row["name"], row["part"], "backward" if row["backward"] else "forward", str(row["count"]), *each, *times]


def table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes, FLOPs and least time of a training step of a preset.")
    parser.add_argument("--preset", default="record")
    parser.add_argument("--tokens", type=int, help="on each GPU; default: the preset's batch over the GPUs")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--kernels", action="store_true", help="every kernel of the fused step, slowest first")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON instead of the tables, or beside them"
    )
    options = parser.parse_args(arguments)
    try:
        settings, tokens = resolve(options.preset, options.tokens, options.gpus)
    except PgolfError as error:
        parser.error(str(error))
    if importlib.util.find_spec("triton") is None:
        parser.error("Inductor needs triton to schedule for a GPU, and it is not installed: pip install triton (Linux)")
    phases = make_phases(settings, tokens, options.gpus)
    answer = {
        "preset": settings.preset,
        "tokens": tokens,
        "gpus": options.gpus,
        "torch": torch.__version__,
        "bandwidth": BANDWIDTH,
        "peak_flops": PEAK_FLOPS,
        "nvlink_bytes_per_second": NVLINK,
        "phases": {phase.name: phase.as_dict() for phase in phases},
        "steps": budgets(phases, settings),
    }
    if options.json == "-":
        print(json.dumps(answer, indent=1))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text_report(phases, settings, tokens, options.gpus, options.kernels)))
    return 0


def resolve(preset: str, tokens: int | None, gpus: int, given: Mapping[str, str] | None = None) -> tuple[Settings, int]:
    """The preset's settings, with others `given` by their upper-case names, and the tokens on each GPU."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    settings = load_settings(given or {}, preset=preset, cuda=False)
    tokens = settings.train_batch_tokens // gpus if tokens is None else tokens
    if tokens < 1 or tokens % settings.train_seq_len:
        raise UserError(f"--tokens {tokens}: must be a multiple of TRAIN_SEQ_LEN={settings.train_seq_len} of {preset}")
    return settings, tokens


if __name__ == "__main__":
    sys.exit(main())
