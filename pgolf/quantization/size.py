"""What a model costs in bytes, before it is finished and after: parameters by role, and the artifact's size.

Without weights, rows are taken for Gaussian, which matrices nearly are. With partly trained weights, a sample of the
rows of every tensor is rounded to nearest and coded; the size hardly changes while a model trains, because a row's step
follows its deviation.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact import coder, read_artifact
from pgolf.artifact.manifest import ROLES
from pgolf.artifact.packed_code import code_bytes, raw_code_bytes
from pgolf.model import ModelConfig, role_of
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.quantizers import QUANTIZERS
from pgolf.settings import Settings

Parameters = Callable[[], Iterable[tuple[str, Tensor]]]

SAMPLE_VALUES = 1 << 17  # of a tensor
NEAR_BUDGET = 0.99  # of it: from here on a run makes ready to choose its steps
CONTAINER_BYTES = 490  # of a run: manifest, lengths and checksums
# Bytes over those of rounding to nearest at the same clip_sigmas, on trained matrices; a trellis's indices are spent
# where they cost least. Of an embedding, of finer steps, no quantiser changes the bytes by more than 1.2%.
QUANTIZER_BYTES = {"rtn": 1.0, "gptq": 1.002, "gptq_cd": 1.0025, "trellis": 0.986}


def entropy_bits(bits: int, clip_sigmas: float) -> float:
    """Order-0 entropy, in bits a weight, of Gaussian rows rounded to steps of clip_sigmas * std / (2^(bits-1) - 1)."""
    top = 2 ** (bits - 1) - 1
    step = clip_sigmas / top

    def below(x: float) -> float:
        return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))

    total = 0.0
    for value in range(-top, top + 1):
        low = 0.0 if value == -top else below((value - 0.5) * step)
        high = 1.0 if value == top else below((value + 0.5) * step)
        if high > low:
            total -= (high - low) * math.log2(high - low)
    return total


def projected_bytes(parameters: Iterable[tuple[str, Tensor]], config: QuantizationConfig) -> dict[str, int]:
    """Bytes by role of the file that float parameters, by name, will make at the settings' steps; without corrections.

    Takes rows of at most `SAMPLE_VALUES` weights a tensor to the CPU and codes them: a tenth of a second.
    """
    size: dict[str, float] = dict.fromkeys(ROLES, 0.0)
    small = []
    for name, parameter in parameters:
        role = role_of(name)
        if role == "control":
            small.append(parameter.detach().cpu().half())
        elif config.bits_of(name) == 16:
            size[role] += 2.0 * parameter.numel()
        elif parameter.numel():
            size[role] += _tensor_bytes(name, parameter.detach(), config)
    size["control"] += len(coder.encode_floats(small))
    return {**{role: round(value) for role, value in size.items()}, "container": CONTAINER_BYTES}


def _tensor_bytes(name: str, parameter: Tensor, config: QuantizationConfig) -> float:
    """Values, scales and order of a parameter (..., rows, columns), from a sample of its rows."""
    rows = parameter.reshape(-1, parameter.shape[-1])
    every = -(-rows.numel() // SAMPLE_VALUES)
    sample = rows[every // 2 :: every].float().cpu()
    found = QUANTIZERS["rtn"](sample, torch.empty(0), config.bits_of(name), config.clip_of(name), config.damping)
    values = len(coder.encode(found.values, config.coder))
    scales = len(coder.encode_floats([found.scale]))
    factor = 1.0 if role_of(name) == "embedding" else QUANTIZER_BYTES[config.quantizer]
    matrices = parameter.numel() // math.prod(parameter.shape[-2:])
    order = matrices * parameter.shape[-1] / 4 if config.quantizer == "trellis" else 0.0
    return (factor * values + scales) * len(rows) / len(sample) + order


def gaussian_bytes(shapes: Mapping[str, tuple[int, ...]], config: QuantizationConfig) -> dict[str, int]:
    """The same without weights, from shapes by name: Gaussian rows, scales and small parameters at 16 bits."""
    size: dict[str, float] = dict.fromkeys(ROLES, 0.0)
    for name, shape in shapes.items():
        role, count, stored_bits = role_of(name), math.prod(shape), config.bits_of(name)
        if stored_bits == 16:
            size[role] += 2.0 * count
            continue
        bits = entropy_bits(stored_bits, config.clip_of(name))
        factor = 1.0 if role == "embedding" else QUANTIZER_BYTES[config.quantizer]
        size[role] += factor * bits * count / 8 + 2.0 * count / shape[-1]
    return {**{role: round(value) for role, value in size.items()}, "container": CONTAINER_BYTES}


def projected_size(
    settings: Settings, parameters: Iterable[tuple[str, Tensor]] | None = None, code: int | None = None
) -> dict[str, Any]:
    """Parameters and projected bytes, from `parameters` where there are some; `code` bytes, packed, are those of now.

    ARTIFACT_BYTES, where set, is what the run fills, whatever the settings' steps would make.
    """
    model, config = ModelConfig.of(settings), QuantizationConfig.of(settings)
    counts: dict[str, int] = {}
    for name, shape in model.shapes().items():
        counts[role_of(name)] = counts.get(role_of(name), 0) + math.prod(shape)
    by_role = gaussian_bytes(model.shapes(), config) if parameters is None else projected_bytes(parameters, config)
    code = code_bytes() if code is None else code
    at_clip_sigmas = sum(by_role.values())
    artifact = settings.artifact_bytes or at_clip_sigmas
    return {
        "preset": settings.preset,
        "from_weights": parameters is not None,
        "parameters": model.parameters(),
        "parameters_by_role": counts,
        "projected_bytes_by_role": by_role,
        "projected_bytes_at_clip_sigmas": at_clip_sigmas,
        "projected_artifact_bytes": artifact,
        "code_bytes": code,
        "code_bytes_raw": raw_code_bytes(),
        "projected_total_bytes": artifact + code,
        "budget_bytes": settings.budget_bytes,
        "fits_budget": artifact + code <= settings.budget_bytes,
    }


class SizeProjection:
    """What a run's artifact is going to take, from the weights that the run had when `make` was called."""

    def __init__(self, parameters: Parameters, settings: Settings, code_bytes: int):
        self.parameters, self.settings, self.code_bytes = parameters, settings, code_bytes
        self.artifact_bytes: int | None = None  # not made yet

    def make(self) -> str:
        """Project, and say in a line what came of it."""
        settings = self.settings
        size = projected_size(settings, self.parameters(), self.code_bytes)
        self.artifact_bytes = size["projected_artifact_bytes"]
        left = size["budget_bytes"] - size["projected_total_bytes"]
        remedy = "ARTIFACT_BYTES is too large" if settings.artifact_bytes else "larger steps will be chosen"
        verdict = f"left: {left}" if left >= 0 else f"over by {-left}: {remedy}"
        return (
            f"projected artifact:{self.artifact_bytes} with code:{size['projected_total_bytes']} "
            f"of {size['budget_bytes']} bytes, {verdict}"
        )

    @property
    def near_budget(self) -> bool:
        """Whether steps are going to be chosen by bytes: what to measure while there is time."""
        settings, total = self.settings, (self.artifact_bytes or 0) + self.code_bytes
        return settings.artifact_bytes > 0 or total > NEAR_BUDGET * settings.budget_bytes

    def error(self, artifact_bytes: int) -> str:
        """How far off it was from the `artifact_bytes` of the file, in a line."""
        made = self.artifact_bytes
        told = f"projected:{made}, size prediction error {made / artifact_bytes - 1:+.2%}" if made else "not projected"
        return f"artifact:{artifact_bytes} bytes, {told}"


def size_of_artifact(path: Path, budget_bytes: int) -> dict[str, Any]:
    """Parameters and bytes by role of a finished file, exactly."""
    artifact = read_artifact(path)
    counts: dict[str, int] = {}
    for tensor in artifact.tensors.values():
        counts[tensor.role] = counts.get(tensor.role, 0) + math.prod(tensor.shape)
    code = code_bytes()
    total = artifact.bytes.total + code
    return {
        "artifact": str(path),
        "parameters": sum(counts.values()),
        "parameters_by_role": counts,
        "bytes_by_role": {**artifact.bytes.roles, "container": artifact.bytes.container},
        "artifact_bytes": artifact.bytes.total,
        "code_bytes": code,
        "code_bytes_raw": raw_code_bytes(),
        "total_bytes": total,
        "budget_bytes": budget_bytes,
        "fits_budget": total <= budget_bytes,
    }
