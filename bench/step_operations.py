"""The operations of a training step, with class, region, bytes and FLOPs: compiled, fused, and the optimiser's."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from compiled_step import Kernel, compiled_kernels
from fused_glue import ADD, EMBED, LANES, MIX, QK, REGIONS, XSA, fused_passes
from static_report import BANDWIDTH, PEAK_FLOPS

from pgolf.model import ModelConfig
from pgolf.settings import Settings
from pgolf.sharding import Plan, cost

NVLINK = 450e9  # bytes a second and direction of one GPU; data sheets of H100 SXM and H200: 900 GB/s both ways together
GLUE = ("glue forward", "glue backward")
CLASSES = ("matrix products", "attention", "MLP", "loss", *GLUE, "weights", "optimiser", "communication")
OTHER = "other glue"
SMALLEST_FACTOR = 32  # products with a smaller size are those of gates, which read GATE_WINDOW channels
# Functions of pgolf/model whose work is glue of a region; the first region with one of a kernel's functions takes it.
FUNCTIONS = {
    EMBED: {"smear", "_embed"},
    LANES: {"route_to_lanes", "merge_lanes", "_two_lane_layer", "norm in _two_lane_layer"},
    MIX: {"mix_with_embedding", "add_skip"},
    ADD: {"_layer", "_parallel_layer", "norm in _layer", "norm in _parallel_layer", "norm in _layers"},
    XSA: {"exclude_self", "gate_heads", "gate_logits"},
    "loss": {"softcapped_cross_entropy", "check_range", "loss"},
    "weights": {"_bank", "_weights"},
    QK: {"rotate", "rotary_tables", "norm in _attend", "norm in _norm_and_rotate", "_norm_and_rotate", "_attend"},
}
CALLS = {"residual": MIX, "qk_norm_rope": QK, "xsa_gate": XSA}  # operations of ours that are a region, by part of name
SMALL_FUNCTIONS = {"_cast", "_rows", "forward", "packed_documents", "rows_as_documents", "attention"}


@dataclass(frozen=True)
class Operation:
    """What is launched alike so many times a step. Bytes and FLOPs are of one."""

    name: str
    part: str  # one of CLASSES
    region: str  # one of REGIONS, or ""
    backward: bool
    bytes_moved: float
    flops: float
    count: int = 1

    def milliseconds(self, device: str) -> float:
        if self.part == "communication":
            return 1e3 * self.count * self.bytes_moved / NVLINK
        return 1e3 * self.count * max(self.bytes_moved / BANDWIDTH[device], self.flops / PEAK_FLOPS)

    def as_dict(self) -> dict:
        times = {f"{device}_ms": self.milliseconds(device) for device in BANDWIDTH}
        return {**self.__dict__, **times}


def compiled_operations(config: ModelConfig, looping: bool, tokens: int, length: int, packed: bool) -> list[Operation]:
    kernels = compiled_kernels(config, looping, tokens, length, packed)
    counts = Counter(operation_of(kernel, length) for kernel in kernels)
    return [Operation(**{**operation.__dict__, "count": count}) for operation, count in counts.items()]


def operation_of(kernel: Kernel, length: int) -> Operation:
    part, region = classify(kernel)
    name = kernel.operation or region or part
    if kernel.shapes:
        name += " " + " ".join("x".join(map(str, shape)) for shape in kernel.shapes[:3])
    # The block's forward is two kernels: its down-projection reads the hidden tensor that the first has written.
    extra = kernel.shapes[0][0] * kernel.shapes[1][0] * 2 if kernel.operation == "pgolf.leaky_relu2_mlp" else 0
    return Operation(name, part, region, kernel.backward, kernel.bytes_moved + extra, flops(kernel, length))


def classify(kernel: Kernel) -> tuple[str, str]:
    """(class, region): from the operation, and for generated kernels from where in the model they come."""
    called = kernel.operation
    if "attention" in called:
        return "attention", ""
    if "cross_entropy" in called:
        return "loss", ""
    for part, region in CALLS.items():
        if called.startswith("pgolf.") and part in called:
            return GLUE[kernel.backward], region
    found = functions(kernel)
    region = next((region for region, names in FUNCTIONS.items() if names & found), "")
    if called == "pgolf.weight_gradient" or "leaky_relu2" in called:
        return "MLP", ""
    if is_product(called) and min(map(min, kernel.shapes)) >= SMALLEST_FACTOR:
        return ("MLP" if "leaky_relu2_mlp" in found else "matrix products"), ""
    if not region:
        region = "weights" if found <= SMALL_FUNCTIONS else OTHER
    if region in ("loss", "weights"):
        return region, ""
    if region in (MIX, ADD):
        region = residual_region(region, found, kernel.backward)
    return GLUE[kernel.backward], region


def residual_region(region: str, found: set[str], backward: bool) -> str:
    """Between attention and MLP, or between MLP and attention: a kernel also names what it takes from a product, and
    either place may compute the layer's mix again."""
    after_attention, after_mlp = "_attend" in found, "leaky_relu2_mlp" in found
    if after_attention == after_mlp:
        return region
    return ADD if after_attention != backward else MIX


def functions(kernel: Kernel) -> set[str]:
    """Where each operation of a kernel was written; of a norm also who asked for it, past the stream's class."""
    passed_over = ("stream.py", "<genexpr>")
    found = set()
    for frames in kernel.sources:
        calls = [frame.split(":") for frame in frames]
        names = [name for file, name in calls if file not in passed_over and name not in passed_over]
        if names:
            found.add(f"norm in {names[-2]}" if names[-1] == "norm" and len(names) > 1 else names[-1])
    return found


def is_product(called: str) -> bool:
    return called.split(".")[-2:-1] in (["mm"], ["addmm"], ["bmm"]) or called in ("mm", "addmm", "bmm")


def flops(kernel: Kernel, length: int) -> int:
    called, shapes = kernel.operation, kernel.shapes
    if is_product(called):
        (*batch, rows, inner), (*_, columns) = shapes[-2:]
        return 2 * rows * inner * columns * (batch[0] if batch else 1)
    if called == "pgolf.leaky_relu2_mlp":
        return 4 * shapes[0][0] * shapes[1][0] * shapes[1][1]
    if called == "pgolf.leaky_relu2_mlp_hidden_gradient":
        return 2 * shapes[0][0] * shapes[1][0] * shapes[1][1]
    if called == "pgolf.weight_gradient":
        return 2 * shapes[0][0] * shapes[0][1] * shapes[1][1]
    if "attention" in called:  # (tokens, heads, head_dim): half of a row's scores, 2 products forward and 5 backward
        tokens, heads, head_dim = shapes[0]
        return (5 if kernel.backward else 2) * 2 * tokens * heads * head_dim * length // 2
    return 0


def fused_operations(
    operations: Iterable[Operation], config: ModelConfig, looping: bool, tokens: int
) -> list[Operation]:
    """The same step with each glue region in one kernel a pass; what belongs to no region stays."""
    kept = [operation for operation in operations if operation.region not in REGIONS]
    counts: Counter[Operation] = Counter()
    for place in fused_passes(config, looping, tokens):
        for backward, size in enumerate((place.forward_bytes, place.backward_bytes)):
            counts[Operation(f"fused {place.region}", GLUE[backward], place.region, bool(backward), size, 0)] += 1
    return kept + [Operation(**{**operation.__dict__, "count": count}) for operation, count in counts.items()]


def optimiser_operations(config: ModelConfig, settings: Settings, gpus: int) -> list[Operation]:
    """Muon on the busiest rank's matrices, AdamW, clipping, moving average; and what travels between GPUs."""
    shapes = config.shapes()
    banks = [shape for name, shape in shapes.items() if name.endswith("_bank")]
    weights = sum(map(math.prod, banks))
    small = config.parameters() - weights
    steps = settings.muon_backend_steps
    plan = Plan(banks, gpus, steps)  # type: ignore[arg-type]
    own = plan.length
    loads = [[cost(shape, steps) * count for count in counts] for shape, counts in zip(banks, plan.counts, strict=True)]
    work = max(map(sum, zip(*loads, strict=True)))
    share = (gpus - 1) / gpus
    made = [
        ("Muon: momentum, row norms", 14 * own, 0),  # gradient, momentum twice, update in bfloat16
        ("Muon: Newton-Schulz", 8 * 2 * own * steps, work),  # X three times, its square matrices five times
        ("Muon: move the banks", 10 * weights, 0),  # weights twice, update
        ("AdamW", 28 * small, 0),  # weights and both moments twice, gradient
    ]
    if settings.grad_clip_norm:
        made.append(("gradient clipping", 12 * (own + small), 0))
    if settings.ema_decay:
        made.append(("moving average", 12 * config.parameters(), 0))
    if gpus > 1:
        made.append(("gradients into the strings of ranks", 8 * weights, 0))
        made.append(("updates out of the strings of ranks", 4 * weights, 0))
    result = [Operation(name, "optimiser", "", False, size, flops) for name, size, flops in made]
    if gpus > 1:
        travelling = {
            "reduce-scatter of the banks' gradients, float32": 4 * plan.length * gpus * share,
            "all-gather of the updates, bfloat16": 2 * plan.length * gpus * share,
            "all-reduce of the other gradients, float32": 2 * 4 * small * share,
        }
        result += [Operation(name, "communication", "", False, size, 0) for name, size in travelling.items()]
    return result
