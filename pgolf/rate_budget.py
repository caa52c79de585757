"""Byte budget: a step for every tensor, so that the coded file is as large as wanted and the loss is least.

For tensor i of n_i weights at clip_sigmas k_i, which is proportional to its step:

    loss     L_i(k) = R_i · (k / k_0)²
    bytes    b_i(k) = b_i(k_0) - n_i / 8 · log2(k / k_0)                   one bit a weight for each halving of the step

The sum of L_i is least, at a given sum of b_i, where dL_i/db_i is the same for all: R_i (k_i / k_0)² / n_i is one
number. Doubling it for all tensors scales all k_i by √2, so one bisection finds it. k_i stays within `CLIPS`.

R_i is measured: the loss on calibration rows with tensor i alone quantised, by the run's quantiser at `PROBE` times its
step, less that of the float model, over PROBE². On a demo model, PROBE 1, 2 and 4 gave the same R_i within 30%, most
within 10%. (tr((W - Q) H (W - Q)ᵀ) weighted by the effect of plain rounding gave the embedding 0.4 of its due: it is
also the model's input, which H knows nothing of.)

The closed loop: code everything at the settings' steps, solve, code again, see by how much the bytes are off, and solve
again with the target moved by that, in at most `MOST_CODINGS` codings. The largest file that is not over wins.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.data.batch import MicroBatch
from pgolf.distributed import Ranks
from pgolf.errors import UserError
from pgolf.model import Model, role_of
from pgolf.quantizers import QUANTIZERS, Quantized
from pgolf.settings import Settings

MOST_CODINGS = 4
TOLERANCE = 1e-3  # below the target, of it
AIM = 4e-4  # the loop aims so much below the target
CLIPS = (4.0, 400.0)
PROBE = 2.0
PROBE_ROWS = 4  # micro-batches of calibration rows for each tensor's probe


@dataclass(frozen=True)
class Coded:
    """One coding of all tensors."""

    total: int  # bytes of the whole file
    sizes: dict[str, int]  # of the quantised tensors' values


@dataclass(frozen=True)
class Fit:
    clips: dict[str, float]
    total: int
    codings: int


def clip_of(name: str, settings: Settings) -> float:
    return clip_of_role(role_of(name), settings)


def clip_of_role(role: str, settings: Settings) -> float:
    if role == "embedding":
        return settings.embed_clip_sigmas
    return (settings.mlp_clip_sigmas if role == "mlp" else settings.attn_clip_sigmas) or settings.matrix_clip_sigmas


def bits_of(name: str, settings: Settings) -> int:
    return settings.embed_bits if role_of(name) == "embedding" else settings.matrix_bits


def quantized_names(model: Model, settings: Settings) -> list[str]:
    """The parameters that QUANTIZER stores; the others are float16."""
    names = [name for name, _ in model.named_parameters() if role_of(name) != "control"]
    return [name for name in names if bits_of(name, settings) < 16]


@torch.inference_mode()
def measure_rises(
    model: Model, hessians: dict[str, Tensor], rows: Iterable[MicroBatch], settings: Settings, ranks: Ranks
) -> dict[str, float]:
    """R_i by name: what quantising each tensor adds to the mean loss of `rows`."""
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in rows]

    def mean_loss() -> float:
        losses = [model.loss(b.inputs, b.targets, "mean", b.cu_seqlens, b.max_seqlen).double() for b in batches]
        total = torch.stack([torch.stack(losses).sum(), torch.tensor(float(len(losses)), device=device)]).cpu()
        ranks.sum_(total)
        return (total[0] / total[1]).item()

    base, rises, names = mean_loss(), {}, quantized_names(model, settings)
    for name, parameter in model.named_parameters():
        if name in names:
            kept = parameter.detach().clone()
            found = quantize_tensor(name, kept.float().cpu(), hessians, settings, PROBE * clip_of(name, settings))
            parameter.copy_(found.dequantize())
            rises[name] = (mean_loss() - base) / PROBE**2
            parameter.copy_(kept)
    # A tensor whose rounding seems to help is one whose effect drowns in noise: take it for the least of the others.
    least = min((rise for rise in rises.values() if rise > 0), default=1.0)
    return {name: rise if rise > 0 else least for name, rise in rises.items()}


def quantize_tensor(
    name: str, weight: Tensor, hessians: dict[str, Tensor], settings: Settings, clip_sigmas: float
) -> Quantized:
    """A parameter by the settings' quantiser."""
    hessian = hessians[name] if weight.ndim == 3 else hessians[name][0]
    return QUANTIZERS[settings.quantizer](weight, hessian, bits_of(name, settings), clip_sigmas, settings.gptq_damping)


def choose_clips(
    clips: dict[str, float], coded: Coded, counts: dict[str, int], rises: dict[str, float], wanted: float
) -> dict[str, float]:
    """Steps of equal slope whose modelled bytes sum to `wanted`, from a coding at `clips`; see the module's text."""
    shift = {name: -0.5 * math.log2(max(rises[name], 1e-30) / counts[name]) for name in clips}  # of log2 k
    low, high = (math.log2(each) for each in CLIPS)

    def at(level: float) -> dict[str, float]:
        return {name: min(max(math.log2(clips[name]) + shift[name] + level, low), high) for name in clips}

    def size(level: float) -> float:
        logs = at(level)
        return sum(coded.sizes[name] - counts[name] / 8 * (logs[name] - math.log2(clips[name])) for name in clips)

    small, large = -100.0, 100.0  # of which the first gives the larger file
    for _ in range(80):
        middle = (small + large) / 2
        small, large = (middle, large) if size(middle) > wanted else (small, middle)
    return {name: 2**each for name, each in at(large).items()}


def fit(
    code: Callable[[dict[str, float]], Coded],
    clips: dict[str, float],
    counts: dict[str, int],
    rises: dict[str, float],
    target: int,
) -> Fit:
    """Code up to `MOST_CODINGS` times; the steps of the largest file of at most `target` bytes.

    `code` quantises and codes all tensors at the given clip_sigmas; `clips` are those to begin with, at which
    `rises` are given, `counts` the tensors' numbers of weights. UserError where no file was small enough.
    """
    first = code(clips)
    found = [(clips, first)]
    best: tuple[dict[str, float], Coded] | None = None
    fixed = first.total - sum(first.sizes.values())
    aim = target * (1 - AIM)
    wanted = aim - fixed
    for _ in range(MOST_CODINGS - 1):
        new = choose_clips(clips, first, counts, rises, wanted)
        if new == found[-1][0]:
            break  # every step is at its limit
        coded = code(new)
        found.append((new, coded))
        if target * (1 - TOLERANCE) <= coded.total <= target:
            break
        wanted += _correction(found, wanted_total=aim)
    for each_clips, coded in found[1:] + found[:1]:  # the first has no equal slopes: the last resort
        if coded.total <= target and (best is None or (coded.total > best[1].total and coded is not first)):
            best = (each_clips, coded)
    if best is None:
        raise UserError(
            f"ARTIFACT_BYTES={target}: the smallest of {len(found)} codings has "
            f"{min(coded.total for _, coded in found)} bytes"
        )
    return Fit(best[0], best[1].total, len(found))


def _correction(found: list[tuple[dict[str, float], Coded]], wanted_total: float) -> float:
    """By how much to move the modelled bytes: what is missing, over how well the last move was followed."""
    missing = wanted_total - found[-1][1].total
    if len(found) < 3:
        return missing
    before, last = found[-2][1].total, found[-1][1].total
    asked = wanted_total - before
    followed = (last - before) / asked if asked else 1.0
    return missing / min(max(followed, 0.5), 2.0)
