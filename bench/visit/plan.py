"""What a visit does, in the order in which it may use the device."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

QUICK_TURNS = 5
SECONDS = 540  # of the visit that the plan is made for; a shorter one shortens every limit


@dataclass(frozen=True)
class Part:
    """A process of its own. Its rank is its place in the plan: who comes first takes the next turn at the device."""

    name: str  # the first word names its file of facts
    command: tuple[str, ...]  # of the interpreter
    turn_s: float  # longest turn; one that lasts longer ends the part
    start: float = 0.0  # second of the visit before which it does not begin
    end: float = SECONDS  # and at which it is ended
    nice: int = 0
    gb: int = 20  # of the device's memory, about; processes that would take too much together wait for each other
    environ: dict[str, str] = field(default_factory=dict)
    asked_for: bool = False  # runs where --parts names it, not by itself

    @property
    def kind(self) -> str:
        return self.name.split()[0]


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return "-m", f"bench.visit.{name}", *arguments


def benchmark(file: str, select: str = "") -> tuple[str, ...]:
    chosen = ("-k", select) if select else ()
    return "-m", "pytest", f"bench/{file}.py", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *chosen


# Operations as they come in the step: what takes most of it first. (name, file, -k on CUDA, -k on a CPU)
OPERATIONS = (
    ("leaky_relu2_mlp", "bench_leaky_relu2_mlp", "", "float32"),
    ("softcapped_cross_entropy", "bench_softcapped_cross_entropy", "", "float32"),
    ("residual_rms_norm", "bench_glue", "mix or add", ""),
    ("qkv_norm_rope", "bench_glue", "product", ""),
    ("newton_schulz", "bench_newton_schulz", "", "eighth and float32"),
    ("two_lane_rms_norm", "bench_glue", "lanes", ""),
    ("xsa_gate", "bench_glue", "gate", ""),
    ("qk_norm_rope", "bench_glue", "rotate and not product", ""),
    ("embedding_smear_norm", "bench_glue", "smeared", ""),
    ("linear_softcapped_cross_entropy", "bench_linear_softcapped_cross_entropy", "", "float32"),
    ("unpack_dequantize", "bench_unpack_dequantize", "", "unpack"),
    ("mlp_stack", "bench_mlp_stack", "", "float32"),
    ("gptq", "bench_gptq", "bank", "512x512 and refine"),
)
STEPS = (  # name, settings
    ("loop plain", "FUSED_GLUE=off"),
    ("loop fused", "FUSED_GLUE=on"),
    ("loop fused graphs", "FUSED_GLUE=on CUDA_GRAPHS=on"),
    ("first plain", "FUSED_GLUE=off"),
    ("first fused", "FUSED_GLUE=on"),
)


def plan(quick: bool, cuda: bool) -> list[Part]:
    """Of a visit; `quick` proves that every part runs, on a CPU too, and measures nothing."""
    small = ("--quick",) if quick else ()
    steps = {
        name: Part(f"step {name}", module("step", *name.split()[:1], *small, *settings.split()), turn_s=40, gb=45)
        for name, settings in STEPS
    }
    parts = [
        Part("machine", module("machine"), turn_s=15, end=60, gb=1),
        Part("machine build", module("machine", "--build"), turn_s=0, end=300, nice=15, gb=0),
        Part("ceilings", module("ceilings", *small), turn_s=40, end=90, gb=10),
        Part("correctness exact", module("correctness", "exact", *small), turn_s=75, end=150),
        steps["loop plain"],
        steps["loop fused"],
        Part("correctness rest", module("correctness", "rest", *small), turn_s=60, start=20, end=330),
        *operations(cuda),
        *(
            Part(f"sweeps {family}", module("sweeps", family, "--seconds", seconds, *small), turn_s=30, start=120)
            for family, seconds in (("glue", "40"), ("loss", "10"), ("mlp", "20"), ("newton_schulz", "20"))
        ),
        *(steps[name] for name in ("loop fused graphs", "first fused", "first plain")),
        Part("ceilings flash4", module("ceilings", "--attention", "flash4", *small), turn_s=60, asked_for=True),
        Part(
            "step loop fused flash4",
            module("step", "loop", *small, "FUSED_GLUE=on", "ATTENTION=flash4"),
            turn_s=60,
            gb=45,
            asked_for=True,
        ),
        Part("ceilings flash3", module("ceilings", "--attention", "flash3", *small), turn_s=30, asked_for=True),
    ]
    if "PGOLF_PEERS" in os.environ:
        parts.append(Part("step loop peer", module("step", "loop", "--peer", *small, "FUSED_GLUE=off"), turn_s=60))
    # On a CPU a turn is not what the plan says of a GPU.
    return [replace(part, turn_s=QUICK_TURNS * part.turn_s) for part in parts] if quick else parts


def operations(cuda: bool) -> Iterable[Part]:
    for name, file, on_cuda, on_cpu in OPERATIONS:
        if cuda or on_cpu:
            yield Part(f"operations {name}", benchmark(file, on_cuda if cuda else on_cpu), turn_s=20, start=30)


def chosen(parts: list[Part], names: list[str], states: dict[str, str]) -> list[Part]:
    """Those that `names` name, by the beginning of their name but for those that are asked for by the whole; and with
    "failed" those whose last state in `states` is not "ok".

    ValueError for a name of no part.
    """
    if not names:
        return [part for part in parts if not part.asked_for]

    def named(part: Part, name: str) -> bool:
        return name == part.name or (part.name.startswith(name) and not part.asked_for)

    for name in names:
        if name != "failed" and not any(named(part, name) for part in parts):
            kinds = sorted({part.kind for part in parts})
            known = ", ".join(["failed", *kinds, *(part.name for part in parts if part.asked_for)])
            raise ValueError(f"--parts: {name!r} begins no part; accepted are beginnings of names: {known}")
    failed = {name for name, state in states.items() if state != "ok"} if "failed" in names else set()
    return [part for part in parts if part.name in failed or any(named(part, name) for name in names)]


def has_cuda() -> bool:
    """Asked of the driver, because torch may have to be unpacked first."""
    there = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    return there and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
