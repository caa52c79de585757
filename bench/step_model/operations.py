"""The operations of a training step, with class, region, bytes and FLOPs: compiled, at least, and the optimiser's."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.kernels.static_report import BANDWIDTH, PEAK_FLOPS
from bench.step_model.compiled_step import Kernel
from bench.step_model.fused_glue import REGIONS, fused_passes
from bench.step_model.regions import CLASSES, GLUE, classify, is_product
from pgolf.model import ModelConfig
from pgolf.settings import Settings
from pgolf.training.sharding import Plan, cost

GATES_AND_PADDING = 128  # columns that a product of q, k and v may have besides, fewer than that
NVLINK = 450e9  # bytes a second and direction of one GPU; data sheets of H100 SXM and H200: 900 GB/s both ways together


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


def operations_of(kernels: Iterable[Kernel], length: int) -> list[Operation]:
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


def has_one_product(kernels: Iterable[Kernel], config: ModelConfig) -> bool:
    """Whether q, k and v (and perhaps a gate) come from one matrix product; one of this width alone may be the head."""
    width = config.model_dim + 2 * config.num_kv_heads * config.head_dim
    forward = (k.shapes[-2:] for k in kernels if not k.backward and is_product(k.operation))
    return sum(a[-1] == config.model_dim and width <= b[-1] < width + GATES_AND_PADDING for a, b in forward) > 1


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


def least_operations(
    operations: Iterable[Operation], config: ModelConfig, looping: bool, tokens: int, one_product: bool
) -> list[Operation]:
    """The same step with each glue region in one kernel a pass; what belongs to no region stays."""
    kept = [operation for operation in operations if operation.region not in REGIONS]
    counts: Counter[Operation] = Counter()
    for place in fused_passes(config, looping, tokens, one_product):
        for backward, size in enumerate((place.forward_bytes, place.backward_bytes)):
            if size:
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
