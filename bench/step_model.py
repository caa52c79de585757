"""A training step of a preset, operation by operation: bytes, FLOPs and the least time on an H100 and an H200.

    python bench/step_model.py [--preset record] [--tokens N] [--gpus 8] [--kernels] [--json [FILE]]

Twice: as the compiler runs it (compiled_step.py: Inductor's own fusions for Hopper, read without a GPU), and as it
could be with everything between the matrix products in one kernel a pass (fused_glue.py). N tokens on each GPU; by
default the preset's batch over the GPUs. Before depth recurrence starts ("pre-loop"; the only phase of a preset without
loops) and after ("loop"). Takes half a minute of CPU time a phase and 11 layers.

The least time of a kernel is the larger of bytes over bandwidth and FLOPs over the peak (static_report.py), of a step
the sum over its kernels, with nothing overlapped and no time between kernels. No device reaches it.

Products are counted at 2 FLOPs a multiplication. Attention: half of a full row of TRAIN_SEQ_LEN, two products forward
and five backward; documents are shorter, so this is the most. Work element by element counts no FLOPs. The optimiser
and communication are this package's, by formulas (step_operations.py). A kernel that serves several regions is counted
in the first that fits, from the functions of pgolf/model that it was traced from; sums do not depend on that.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from fused_glue import REGIONS
from static_report import BANDWIDTH, PEAK_FLOPS
from step_operations import (
    CLASSES,
    GLUE,
    NVLINK,
    OTHER,
    Operation,
    compiled_operations,
    fused_operations,
    optimiser_operations,
)

from pgolf.errors import PgolfError, UserError
from pgolf.model import ModelConfig
from pgolf.settings import Settings, load_settings

# Of a step on 8xH100 SXM with the preset's own batch, from the entries' train logs; of pr1855 by #1787, the nearest.
MEASURED_MS = {
    "baseline": {"pre-loop": 43.5},
    "pr66": {"pre-loop": 64.3},
    "pr1493": {"pre-loop": 102.0, "loop": 151.0},
    "pr1855": {"pre-loop": 95.9, "loop": 140.5},
    "record": {"pre-loop": 95.1, "loop": 139.5},
}


@dataclass(frozen=True)
class Phase:
    """A step before depth recurrence starts, or after."""

    name: str
    layers: int
    compiled: list[Operation]
    fused: list[Operation]
    measured_ms: float | None = None  # by others, of the same batch

    @property
    def bytes_ratio(self) -> float:
        return total_bytes(self.fused) / total_bytes(self.compiled)

    @property
    def glue_ratio(self) -> float:
        return total_bytes(self.fused, GLUE) / total_bytes(self.compiled, GLUE)

    def regions(self) -> list[dict]:
        """What fusing saves, largest first."""
        rows = []
        for region in (*REGIONS, OTHER):
            now, then = ([o for o in side if o.region == region] for side in (self.compiled, self.fused))
            if not now and not then:
                continue
            saved = total_bytes(now) - total_bytes(then)
            rows.append(
                {
                    "region": region,
                    "places": sum(o.count for o in then if not o.backward),
                    "kernels": sum(o.count for o in now),
                    **{f"{side}_{pass_}_bytes": sum(o.count * o.bytes_moved for o in operations if o.backward == back)
                       for side, operations in (("compiled", now), ("fused", then))
                       for back, pass_ in enumerate(("forward", "backward"))},
                    "saved_bytes": saved,
                    **{f"saved_{device}_ms": 1e3 * saved / bandwidth for device, bandwidth in BANDWIDTH.items()},
                }
            )  # fmt: skip
        return sorted(rows, key=lambda row: -row["saved_bytes"])

    def as_dict(self) -> dict:
        return {
            "layers": self.layers,
            "measured_ms": self.measured_ms,
            "bytes_ratio": self.bytes_ratio,
            "glue_bytes_ratio": self.glue_ratio,
            "regions": self.regions(),
            **{side: {"total": totals(operations), "classes": {part: totals(operations, (part,)) for part in CLASSES},
                      "operations": [o.as_dict() for o in sorted(operations, key=lambda o: -o.milliseconds("h100"))]}
               for side, operations in (("compiled", self.compiled), ("fused", self.fused))},
        }  # fmt: skip


def total_bytes(operations: Iterable[Operation], parts: tuple[str, ...] = CLASSES[:-1]) -> float:
    """Of memory; what travels between GPUs does not count."""
    return sum(o.count * o.bytes_moved for o in operations if o.part in parts)


def totals(operations: Iterable[Operation], parts: tuple[str, ...] = CLASSES) -> dict:
    mine = [o for o in operations if o.part in parts]
    return {
        "kernels": sum(o.count for o in mine),
        "bytes": total_bytes(mine),
        "flops": sum(o.count * o.flops for o in mine),
        **{f"{device}_ms": sum(o.milliseconds(device) for o in mine) for device in BANDWIDTH},
    }


def make_phases(settings: Settings, tokens: int, gpus: int) -> list[Phase]:
    config = ModelConfig.of(settings)
    rest = optimiser_operations(config, settings, gpus)
    alike = gpus == 8 and tokens * gpus == settings.train_batch_tokens
    measured = MEASURED_MS.get(settings.preset, {}) if alike else {}
    phases = []
    for name, looping in (("pre-loop", False), ("loop", True)):
        if looping and not config.num_loops:
            continue
        packed = settings.loader == "documents"
        compiled = compiled_operations(config, looping, tokens, settings.train_seq_len, packed)
        fused = fused_operations(compiled, config, looping, tokens)
        phases.append(Phase(name, len(config.visits(looping)), compiled + rest, fused + rest, measured.get(name)))
    return phases


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
        for side in ("compiled", "fused"):
            times = {phase.name: totals(getattr(phase, side))[f"{device}_ms"] for phase in phases}
            answer[f"{device} least time, {side}"] = steps_in_budget(phases, settings, times)
    measured = {phase.name: phase.measured_ms for phase in phases if phase.measured_ms is not None}
    if len(measured) == len(phases):
        saved = {p.name: totals(p.compiled)["h100_ms"] - totals(p.fused)["h100_ms"] for p in phases}
        answer["measured"] = steps_in_budget(phases, settings, measured)
        less = {name: measured[name] - saved[name] for name in saved}
        answer["measured less what fusing saves"] = steps_in_budget(phases, settings, less)
    return answer


def text_report(phases: list[Phase], settings: Settings, tokens: int, gpus: int, kernels: bool) -> list[str]:
    lines = [f"{settings.preset}: {tokens} tokens on each of {gpus} GPUs, bfloat16"]
    for phase in phases:
        measured = "" if phase.measured_ms is None else f"; measured on 8xH100: {phase.measured_ms} ms"
        lines += ["", f"{phase.name}: {phase.layers} layers run{measured}", ""]
        lines += table([CLASS_HEADER, *(class_row(phase, part) for part in (*CLASSES, "all"))])
        lines += ["", "glue by region, what fusing saves first:", ""]
        lines += table([REGION_HEADER, *map(region_row, phase.regions())])
        ratios = f"{phase.bytes_ratio:.3f} of all bytes, {phase.glue_ratio:.3f} of the glue's"
        lines += ["", f"after fusing: {ratios}"]
        if kernels:
            lines += ["", *table([OPERATION_HEADER, *map(operation_row, phase.as_dict()["compiled"]["operations"])])]
    lines += ["", f"steps in {settings.max_wallclock_seconds:g} s, {settings.gptq_reserve_seconds:g} kept back:", ""]
    return [*lines, *table([[name, str(steps)] for name, steps in budgets(phases, settings).items()])]


CLASS_HEADER = ["class", "kernels", "GB", "TFLOP", "H100 ms", "H200 ms", "fused: GB", "H100 ms", "H200 ms"]
REGION_HEADER = [
    "region",
    "places",
    "kernels",
    "GB fwd",
    "GB bwd",
    "fused: fwd",
    "bwd",
    "saves GB",
    "H100 ms",
    "H200 ms",
]
OPERATION_HEADER = ["operation", "class", "pass", "count", "MB each", "GFLOP each", "H100 ms", "H200 ms"]


def class_row(phase: Phase, part: str) -> list[str]:
    parts = CLASSES if part == "all" else (part,)
    now, then = totals(phase.compiled, parts), totals(phase.fused, parts)
    numbers = (now["bytes"] / 1e9, now["flops"] / 1e12, now["h100_ms"], now["h200_ms"])
    fused = (then["bytes"] / 1e9, then["h100_ms"], then["h200_ms"])
    return [part, str(now["kernels"]), *(f"{number:.2f}" for number in (*numbers, *fused))]


def region_row(row: dict) -> list[str]:
    names = ("compiled_forward_bytes", "compiled_backward_bytes", "fused_forward_bytes", "fused_backward_bytes")
    sizes = [f"{row[name] / 1e9:.2f}" for name in (*names, "saved_bytes")]
    times = [f"{row[f'saved_{device}_ms']:.2f}" for device in BANDWIDTH]
    return [row["region"], str(row["places"]), str(row["kernels"]), *sizes, *times]


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
    parser.add_argument("--kernels", action="store_true", help="every kernel that the compiler makes, slowest first")
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


def resolve(preset: str, tokens: int | None, gpus: int) -> tuple[Settings, int]:
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    settings = load_settings({}, preset=preset, cuda=False)
    tokens = settings.train_batch_tokens // gpus if tokens is None else tokens
    if tokens < 1 or tokens % settings.train_seq_len:
        raise UserError(f"--tokens {tokens}: must be a multiple of TRAIN_SEQ_LEN={settings.train_seq_len} of {preset}")
    return settings, tokens


if __name__ == "__main__":
    sys.exit(main())
