"""What a model costs in bytes: counted code, parameters by role, and the artifact's size before anything is trained."""

import math
import sys
from pathlib import Path
from typing import Any

import pgolf
from pgolf.model import ModelConfig, role_of
from pgolf.rate_budget import clip_of_role
from pgolf.settings import Settings

# Brotli's and zstandard's excess over the order-0 entropy of int6 weights, as measured on trained ones (1.014).
CODER_EXCESS = 1.015
MANIFEST_BYTES = 600


def code_files() -> list[Path]:
    """The files whose bytes count as code: the script that was started and all of this package's sources.

    The accepted entries count the script alone, minified and compressed. Here nothing is left out and nothing squeezed.
    """
    package = Path(pgolf.__file__).parent
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".html")]
    checkout = package.parent
    for folder in ("csrc", "triton_kernels"):
        files += [path for path in (checkout / folder).glob("*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    script = checkout / "train_gpt.py"
    if not script.exists():
        script = Path(sys.argv[0])
    if script.suffix == ".py" and script.exists():
        files.append(script)
    return sorted(set(files))


def code_bytes() -> int:
    return sum(path.stat().st_size for path in code_files())


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


def projected_size(settings: Settings) -> dict[str, Any]:
    """Parameters and projected bytes by role, without training; weights are taken for Gaussian rows, and nearly are."""
    config = ModelConfig.of(settings)
    bits_of = {role: entropy_bits(settings.matrix_bits, clip_of_role(role, settings)) for role in ("attention", "mlp")}
    stored_float = {"control"}  # float16
    if settings.embed_bits == 16:
        stored_float.add("embedding")
    else:
        bits_of["embedding"] = entropy_bits(settings.embed_bits, settings.embed_clip_sigmas)
    parameters: dict[str, int] = {}
    size: dict[str, float] = {}
    for name, shape in config.shapes().items():
        role, count = role_of(name), math.prod(shape)
        parameters[role] = parameters.get(role, 0) + count
        # a quantised row has a float16 scale
        bits = 16.0 * count if role in stored_float else CODER_EXCESS * bits_of[role] * count + 16.0 * count / shape[-1]
        size[role] = size.get(role, 0.0) + bits / 8
    if settings.artifact_bytes:  # steps will be chosen to fill them
        floats = sum(value for role, value in size.items() if role in stored_float)
        coded = sum(size.values()) - floats
        factor = (settings.artifact_bytes - MANIFEST_BYTES - floats) / coded
        size = {role: value * (1.0 if role in stored_float else factor) for role, value in size.items()}
    by_role = {role: round(value) for role, value in size.items()}
    artifact = sum(by_role.values()) + MANIFEST_BYTES
    code = code_bytes()
    return {
        "preset": settings.preset,
        "parameters": config.parameters(),
        "parameters_by_role": parameters,
        "projected_bytes_by_role": {**by_role, "container": MANIFEST_BYTES},
        "projected_artifact_bytes": artifact,
        "code_bytes": code,
        "projected_total_bytes": artifact + code,
        "budget_bytes": settings.budget_bytes,
        "fits_budget": artifact + code <= settings.budget_bytes,
    }
