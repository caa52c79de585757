"""Where a preset's training step spends its time on this device, by class, from a profile of a few steps.

    python -m bench.step_model.profile [--preset pr1855] [--first-phase] [--steps 5] [--json FILE] [SETTING=value ...]

Settings change the step that is profiled (FUSED_GLUE=on). On a GPU the times are of its kernels, on a CPU of torch's
operations without what they call. The optimiser's part is all that runs in its step; an operation of this package has
what it launches, its products too; the rest goes by name. Time in which a GPU has nothing to do is not counted:
`step_ms` beside the sum tells how much that is.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness.training_step import CUDA, make_trainer, settings_of, take_step
from pgolf.errors import PgolfError
from pgolf.training.trainer import Trainer

OPTIMISER = "optimiser step"  # name of the range
# The first with a match counts: names of CUDA kernels, of Triton's, and of torch's operations on a CPU. Inductor names
# its kernels after operations that are in them or beside them, so these come first.
PATTERNS = (
    ("products", r"^triton_(tem|mm)_"),
    ("glue", r"^triton_(poi|red|per|for)_"),
    ("communication", r"nccl|gloo|c10d"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("MLP", r"leaky_relu2|weight_gradient|leaky_relu_square"),
    ("loss", r"cross_entropy|softcapped|_ce_fwd|_ce_bwd|log_softmax|nll_loss"),
    ("optimiser", r"multi_tensor|FusedAdam|_foreach|_fused_adam|newton_schulz|symmetric_product|row_sums_kernel"),
    ("products", r"gemm|nvjet|cutlass|cublas|splitK|aten::(mm|bmm|addmm|baddbmm)$"),
    ("glue", r"rms_norm|norm_rope|xsa_gate|smear|elementwise|reduce_kernel|CatArray|index|aten::"),
)
NAMES = (*dict.fromkeys(part for part, _ in PATTERNS), "other")


def classify(name: str, callers: Sequence[str] = ()) -> str:
    """One of NAMES, for a kernel or an operation; `callers`: what called it, outermost first.

    What an operation of this package launches is of its class, products too; what the optimiser launches, the
    optimiser's, but for communication.
    """
    ours = [caller for caller in callers if caller.startswith("pgolf::")]
    parts = [next((part for part, form in PATTERNS if re.search(form, each)), "other") for each in (*ours, name)]
    return "optimiser" if OPTIMISER in callers and parts[-1] != "communication" else parts[0]


def timed(events: Iterable) -> Iterator[tuple[str, float, list[str]]]:
    """(name, microseconds, callers) of each kernel, or on a CPU of each operation's own part."""
    events = list(events)
    hosts = [event for event in events if event.device_type == DeviceType.CPU]
    if not CUDA:
        for event in hosts:
            if "::" in event.name:
                yield event.name, event.self_cpu_time_total, _callers(event)[:-1]
        return
    ranges = {event.name for event in events if event.is_user_annotation}  # which the device's side repeats
    launched: Counter[tuple[str, float]] = Counter()
    for event in hosts:
        for kernel in event.kernels:
            if kernel.name not in ranges:
                launched[kernel.name, kernel.duration] += 1
                yield kernel.name, kernel.duration, _callers(event)
    for event in events:
        if event.device_type == DeviceType.CPU or event.name in ranges:
            continue
        kernel = event.name, event.time_range.end - event.time_range.start
        if not launched[kernel]:  # by nobody that was seen
            yield *kernel, []
        launched[kernel] -= 1


def _callers(event) -> list[str]:
    """Outermost first, the event itself last."""
    names: list[str] = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names[::-1]


def breakdown(events: Iterable, steps: int) -> dict[str, dict[str, float]]:
    """{class: {"ms", "launches"} a step}, those that occur."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, microseconds, callers in timed(events):
        found[classify(name, callers)].append(microseconds)
    return {
        part: {"ms": sum(found[part]) / 1e3 / steps, "launches": len(found[part]) / steps}
        for part in NAMES
        if part in found
    }


def profiled(trainer: Trainer, steps: int) -> dict:
    """`step_ms` without the profiler, and the classes with it."""
    optimise = trainer.optimisers.step

    def in_range(loss):
        with record_function(OPTIMISER):
            return optimise(loss)

    trainer.optimisers.step = in_range  # type: ignore[method-assign]
    for _ in range(3):
        take_step(trainer)
    begin = _now()
    for _ in range(steps):
        take_step(trainer)
    step_ms = 1e3 * (_now() - begin) / steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as record:
        for _ in range(steps):
            take_step(trainer)
        _now()
    classes = breakdown(record.events(), steps)
    return {"step_ms": step_ms, "sum_ms": sum(part["ms"] for part in classes.values()), "classes": classes}


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Where a training step spends its time, by class.")
    parser.add_argument("--preset", default="pr1855")
    parser.add_argument("--first-phase", action="store_true", help="before layers are looped")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="SETTING=value")
    options = parser.parse_args(arguments)
    environ = dict(setting.split("=", 1) for setting in options.settings if "=" in setting)
    try:
        settings = settings_of(options.preset, **environ)
    except PgolfError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, Path(folder), last_phase=not options.first_phase)
        answer = {
            "preset": options.preset,
            "settings": environ,
            "looping": trainer.model.looping,
            "tokens": settings.train_batch_tokens,
            "device": torch.cuda.get_device_name() if CUDA else "cpu",
            "torch": torch.__version__,
            "attention": trainer.model.execution.attention,
            **profiled(trainer, options.steps),
        }
    for part, row in answer["classes"].items():
        print(f"{part:14} {row['ms']:10.3f} ms {row['launches']:8.0f} launches")
    print(f"{'sum':14} {answer['sum_ms']:10.3f} ms of {answer['step_ms']:.3f} ms a step")
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
