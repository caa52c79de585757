"""From trained weights to what the artifact stores.

Matrices and embedding: QUANTIZER against the Hessian of their inputs, int6 and int8 with one float16 scale a row. Small
parameters: float16. LQER_RANK adds low-rank corrections.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pgolf.artifact import ByteCount, StoredTensor
from pgolf.errors import QuantizeError
from pgolf.model import Model, role_of
from pgolf.quantization import byte_budget, low_rank
from pgolf.quantization.byte_budget import Coded, Fit
from pgolf.quantization.config import QuantizationConfig


def quantize(
    model: Model,
    hessians: dict[str, Tensor],
    config: QuantizationConfig,
    clips: dict[str, float] | None = None,
    alive: Callable[[], Any] = lambda: None,
) -> list[StoredTensor]:
    """Every parameter in its stored form, then the corrections. `clips` are the clip_sigmas of single tensors; `alive`
    is called after each of those that take time."""
    stored, weights = [], {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        role = role_of(name)
        shape = tuple(weight.shape)
        if config.bits_of(name) == 16:
            if not weight.half().isfinite().all():
                raise QuantizeError(f"{name}: holds numbers that are not finite in float16")
            stored.append(StoredTensor(name, role, shape, weight.half(), None, 16))
            continue
        bits = config.bits_of(name)
        clip_sigmas = (clips or {}).get(name, config.clip_of(name))
        try:
            found = config.quantize(name, weight, hessians, clip_sigmas)
        except ValueError as error:
            raise QuantizeError(f"{name}: {error}") from None
        stored.append(StoredTensor(name, role, shape, found.values, found.scale, bits, found.order, found.states))
        alive()
    if config.lqer_rank:
        stored += low_rank.corrections(weights, stored, hessians, config)
    return stored


def quantize_to_size(
    model: Model,
    hessians: dict[str, Tensor],
    config: QuantizationConfig,
    rises: dict[str, float],
    write: Callable[[list[StoredTensor]], ByteCount],
    target: int,
    first: ByteCount | None = None,
    alive: Callable[[], Any] = lambda: None,
) -> tuple[Fit, str]:
    """Quantise and `write` until the file has `target` bytes, or up to 0.1% fewer; and what that cost, in words.

    `rises` are those of `byte_budget.measure_rises`; without any, all steps change by one factor. `first` are the bytes
    of the file at the settings' steps, if it has been written. Where the least possible file is not small enough the
    smallest is kept.
    """
    names = byte_budget.quantized_names(model, config)
    counts = {name: p.numel() for name, p in model.named_parameters() if name in names}
    last: dict[str, float] = {}

    def coded(count: ByteCount) -> Coded:
        return Coded(count.total, {name: count.streams[f"{name}:values"] for name in counts})

    def code(clips: dict[str, float]) -> Coded:
        count = write(quantize(model, hessians, config, clips, alive))
        last.clear()
        last.update(clips)
        return coded(count)

    clips = {name: config.clip_of(name) for name in counts}
    equal = {name: float(count) for name, count in counts.items()}
    found = byte_budget.fit(code, clips, counts, rises or equal, target, coded(first) if first else None)
    if last != found.clips:
        write(quantize(model, hessians, config, found.clips, alive))
    return found, byte_budget.cost(found, clips, counts, rises)


def quantize_within_budget(
    model: Model,
    hessians: dict[str, Tensor],
    config: QuantizationConfig,
    rises: dict[str, float],
    write: Callable[[list[StoredTensor]], ByteCount],
    budget_bytes: int,
    code_bytes: int,
    wanted: int = 0,  # ARTIFACT_BYTES
    alive: Callable[[], Any] = lambda: None,
) -> str | None:
    """Quantise and `write` at the settings' steps, at `wanted` bytes, or, when over budget, at steps that fit.

    A line says what that took; None where the settings' steps were good enough.
    """
    room, first, because = budget_bytes - code_bytes, None, ""
    target = min(wanted or room, room)
    if not wanted or room <= 0:
        first = write(quantize(model, hessians, config, alive=alive))
        if first.total <= room:
            return None
        because = f"{first.total - room} bytes over budget at the settings' steps; "
        if room <= 0:
            return f"artifact: {because}the code alone takes {code_bytes} of {budget_bytes}"
    elif wanted > room:
        because = f"ARTIFACT_BYTES={wanted} leaves too little for {code_bytes} bytes of code; "
    found, cost = quantize_to_size(model, hessians, config, rises, write, target, first, alive)
    short = "" if found.fits else ", the smallest achievable size"
    return f"artifact:{found.total} of {target} bytes{short}: {because}{cost}"
