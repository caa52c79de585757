"""Byte budget: a step for every tensor, so that the coded file is as large as wanted and the loss is least.

For tensor i of n_i weights at clip_sigmas k_i, which is proportional to its step:

    loss     L_i(k) = R_i · (k / k_0)²
    bytes    b_i(k) = n_i / 8 · ½ log2(1 + 4^y_i(k)),    y_i falls by one a doubling of k until codings say otherwise

½ log2(1 + (σ / D)²) is the rate of a Gaussian at a distortion of D: one bit a weight for each halving of the step while
values are large, and ever less where most are 0. After two codings y_i is the line through them, and so on.

The sum of L_i is least, at a given sum of b_i, where dL_i/db_i is the same for all. At high rates that is where
R_i (k_i / k_0)² / n_i is one number. Doubling it for all tensors scales all k_i by √2, so one bisection finds it. k_i
stays within `CLIPS`.

R_i is measured: the loss on calibration rows with tensor i alone quantised, by the run's quantiser at `PROBE` times its
step, less that of the float model, over PROBE². On a demo model, PROBE 1, 2 and 4 gave the same R_i within 30%, most
within 10%. (tr((W - Q) H (W - Q)ᵀ) weighted by the effect of plain rounding gave the embedding 0.4 of its due: it is
also the model's input, which H knows nothing of.)

The closed loop: code everything at the settings' steps, solve, code again, and solve again with the curves through all
that was coded, in at most `MOST_CODINGS` codings. The last one keeps to the coding that came nearest, and moves the
tensors whose bytes were foreseen: one whose rate has a kink can be wrong by as much again. The largest file that is not
over wins. Where all are over, all steps grow by one factor in up to `MOST_SHRINKINGS` more codings, which ask for less
and less, and then to the largest of `CLIPS`: a file over its target is the least that can be had.
"""

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.data.batch import MicroBatch
from pgolf.model import Model
from pgolf.quantization.config import QuantizationConfig
from pgolf.runtime.ranks import Ranks

MOST_CODINGS = 4
MOST_SHRINKINGS = 4  # more codings where all of those were over, before the least possible file
TOLERANCE = 1e-3  # below the target, of it
AIM = 4e-4  # the loop aims so much below the target
LAST_AIM = 6e-4  # as much where no coding will follow, and more the worse sizes were foreseen; see `_last_aim`
LOWEST_AIM = 2.5e-3
CLIPS = (4.0, 400.0)
LEAST_BITS = 1e-3  # a weight
NEAR = 0.02  # octaves of k, within which two codings say little of a slope
STEEPEST, FLATTEST = -2.0, -0.25  # slopes of y beyond all codings
DOUBT = 5e-3  # of the target an octave: with slopes wrong by as much, a tensor moves half as far in the last coding
LAST_MOVE = 0.5  # octaves, at most
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
    fits: bool  # whether `total` is at most the target


def quantized_names(model: Model, config: QuantizationConfig) -> list[str]:
    """The parameters that QUANTIZER stores; the others are float16."""
    return [name for name, _ in model.named_parameters() if config.bits_of(name) < 16]


@torch.inference_mode()
def measure_rises(
    model: Model, hessians: dict[str, Tensor], rows: Iterable[MicroBatch], config: QuantizationConfig, ranks: Ranks
) -> dict[str, float]:
    """R_i by name: what quantising each tensor adds to the mean loss of `rows`."""
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in rows]

    def mean_loss() -> float:
        losses = [model.loss(b.inputs, b.targets, "mean", b.cu_seqlens, b.max_seqlen).double() for b in batches]
        total = torch.stack([torch.stack(losses).sum(), torch.tensor(float(len(losses)), device=device)]).cpu()
        ranks.sum_(total)
        return (total[0] / total[1]).item()

    base, rises, names = mean_loss(), {}, quantized_names(model, config)
    for name, parameter in model.named_parameters():
        if name in names:
            kept = parameter.detach().clone()
            found = config.quantize(name, kept.float().cpu(), hessians, PROBE * config.clip_of(name))
            parameter.copy_(found.dequantize())
            rises[name] = (mean_loss() - base) / PROBE**2
            parameter.copy_(kept)
    # A tensor whose rounding seems to help is one whose effect drowns in noise: take it for the least of the others.
    least = min((rise for rise in rises.values() if rise > 0), default=1.0)
    return {name: rise if rise > 0 else least for name, rise in rises.items()}


class Rate:
    """A tensor's bytes by its clip_sigmas, from what codings took; see the module's text."""

    def __init__(self, count: int):
        self.count = count
        self.points: list[tuple[float, float]] = []  # (log2 k, y), ascending
        self.doubt = 0.0  # bytes an octave: by how much its slope was wrong, at most

    def learn(self, clip_sigmas: float, size: int) -> float:
        """Take in that a coding at `clip_sigmas` took `size` bytes; by how many that is more than foreseen."""
        log_k, bits = math.log2(clip_sigmas), max(8 * size / self.count, LEAST_BITS)
        surprise = 0.0
        if self.points:
            surprise = size - self.bytes_at(log_k)
            moved = min(abs(log_k - point[0]) for point in self.points)
            self.doubt = max(self.doubt, abs(surprise) / max(moved, LAST_MOVE / 2))
        others = [point for point in self.points if point[0] != log_k]
        self.points = sorted([*others, (log_k, math.log2(4**bits - 1) / 2)])
        return surprise

    def bytes_at(self, log_k: float) -> float:
        """What a coding at clip_sigmas of 2**log_k should take."""
        last = len(self.points) - 1
        start = min(max(bisect.bisect(self.points, (log_k,)) - 1, 0), max(last - 1, 0))
        (x0, y0), (x1, y1) = self.points[start], self.points[min(start + 1, last)]
        run, rise = x1 - x0, y1 - y0
        if x0 < log_k < x1:
            slope = rise / run
        else:  # -1 as far as the two do not say
            slope = min(max((run * rise - NEAR**2) / (run**2 + NEAR**2), STEEPEST), FLATTEST)
        x, y = (x0, y0) if log_k < x1 else (x1, y1)
        return self.count / 16 * math.log2(1 + 4 ** (y + slope * (log_k - x)))


Logs = dict[str, float]  # log2 k by name


def choose_clips(
    clips: dict[str, float], rates: dict[str, Rate], rises: dict[str, float], wanted: float
) -> dict[str, float]:
    """Steps of equal slope whose modelled bytes sum to `wanted`; `rises` are those at `clips`."""
    slopes = {name: max(rises[name], 1e-30) / rate.count for name, rate in rates.items()}
    base = {name: math.log2(k) - math.log2(slopes[name]) / 2 for name, k in clips.items()}
    return _solve(rates, lambda level: {name: each + level for name, each in base.items()}, wanted)


def correct_clips(clips: dict[str, float], rates: dict[str, Rate], doubt: float, wanted: float) -> dict[str, float]:
    """Steps near `clips` whose modelled bytes sum to `wanted`. A tensor of twice the `doubt` moves a fifth as far."""
    trust = {name: 1 / (1 + (rate.doubt / doubt) ** 2) for name, rate in rates.items()}

    def at(level: float) -> Logs:
        moves = {name: min(max(each * level, -LAST_MOVE), LAST_MOVE) for name, each in trust.items()}
        return {name: math.log2(k) + moves[name] for name, k in clips.items()}

    return _solve(rates, at, wanted)


def larger_clips(clips: dict[str, float], rates: dict[str, Rate], wanted: float) -> dict[str, float]:
    """Steps that are those of `clips` times one factor of at least 1, whose modelled bytes sum to `wanted`."""
    found = _solve(rates, lambda level: {name: math.log2(k) + level for name, k in clips.items()}, wanted)
    return {name: max(k, found[name]) for name, k in clips.items()}


def _solve(rates: dict[str, Rate], at: Callable[[float], Logs], wanted: float) -> dict[str, float]:
    """The clip_sigmas, `at` some level and within `CLIPS`, whose modelled bytes sum to `wanted`."""
    low, high = (math.log2(each) for each in CLIPS)

    def within(level: float) -> Logs:
        return {name: min(max(each, low), high) for name, each in at(level).items()}

    small, large = -1e4, 1e4  # of which the first gives the larger file
    for _ in range(80):
        middle = (small + large) / 2
        modelled = sum(rates[name].bytes_at(log_k) for name, log_k in within(middle).items())
        small, large = (middle, large) if modelled > wanted else (small, middle)
    return {name: 2**each for name, each in within(large).items()}


def fit(
    code: Callable[[dict[str, float]], Coded],
    clips: dict[str, float],
    counts: dict[str, int],
    rises: dict[str, float],
    target: int,
    first: Coded | None = None,
) -> Fit:
    """The steps of the largest file of at most `target` bytes among `MOST_CODINGS` codings, or more where all are over.

    `code` quantises and codes all tensors at the given clip_sigmas; `clips` are those to begin with, at which
    `rises` are given and `first` was coded, if it was; `counts` are the tensors' numbers of weights.
    """
    rates = {name: Rate(count) for name, count in counts.items()}
    found = _close_in(code, clips, rates, rises, target, first or code(clips))
    if min(coded.total for _, coded in found) > target:
        found += _shrink(code, found, rates, target)
    small_enough = [each for each in found if each[1].total <= target]
    if small_enough:  # the first has no equal slopes: the last resort
        chosen = max(small_enough, key=lambda each: (each is not found[0], each[1].total))
    else:
        chosen = min(found, key=lambda each: each[1].total)
    return Fit(chosen[0], chosen[1].total, len(found), chosen[1].total <= target)


Codings = list[tuple[dict[str, float], Coded]]


def _close_in(
    code: Callable[[dict[str, float]], Coded],
    clips: dict[str, float],
    rates: dict[str, Rate],
    rises: dict[str, float],
    target: int,
    first: Coded,
) -> Codings:
    """At most `MOST_CODINGS`, the first among them, until one is in the band below `target`."""
    found = [(clips, first)]
    while len(found) < MOST_CODINGS:
        last, coded = found[-1]
        surprise = _learn(rates, last, coded) / target
        fixed = coded.total - sum(coded.sizes.values())
        if len(found) < MOST_CODINGS - 1:
            new = choose_clips(clips, rates, rises, target * (1 - AIM) - fixed)
        else:
            nearest, its = min(found, key=lambda each: abs(each[1].total - target))
            aim = target * (1 - _last_aim(surprise, abs(its.total / target - 1)))
            new = correct_clips(nearest, rates, DOUBT * target, aim - fixed)
        if new == last:
            break  # every step is at its limit
        found.append((new, code(new)))
        if target * (1 - TOLERANCE) <= found[-1][1].total <= target:
            break
    return found


def _shrink(code: Callable[[dict[str, float]], Coded], found: Codings, rates: dict[str, Rate], target: int) -> Codings:
    """More codings where all in `found` are over: all steps grow by one factor, from those of the smallest file on and
    each time by more than the excess asks for, until a file fits; the last resort is the least possible file."""
    _learn(rates, *found[-1])
    clips, coded = min(found, key=lambda each: each[1].total)
    most = {name: max(k, CLIPS[1]) for name, k in found[0][0].items()}
    more: Codings = []
    while coded.total > target and any(k < most[name] * (1 - 1e-9) for name, k in clips.items()):
        if len(more) < MOST_SHRINKINGS:
            margin = 2 ** len(more) * max(LAST_AIM * target, coded.total - target)
            clips = larger_clips(clips, rates, target - margin - coded.total + sum(coded.sizes.values()))
        else:
            clips = most
        coded = code(clips)
        _learn(rates, clips, coded)
        more.append((clips, coded))
    return more


def _learn(rates: dict[str, Rate], clips: dict[str, float], coded: Coded) -> float:
    """Take in one coding; by how many bytes the tensors' sizes were not foreseen, in all."""
    return sum(abs(rate.learn(clips[name], coded.sizes[name])) for name, rate in rates.items())


def _last_aim(surprise: float, miss: float) -> float:
    """How far below the target the last coding aims, of it: `surprise` is by how much the tensors' bytes were not
    foreseen, `miss` by how much the nearest file was off; both of the target. Found by trial, see bench/NOTES.md."""
    return min(LAST_AIM + 1.3 * surprise**2 + 0.3 * max(miss - 0.01, 0.0), LOWEST_AIM)


def cost(found: Fit, clips: dict[str, float], counts: dict[str, int], rises: dict[str, float]) -> str:
    """What it cost to go from `clips` to those found: steps, and loss by the model where rises were measured."""
    weights = sum(counts.values())
    ratio = 2 ** (sum(counts[name] * math.log2(found.clips[name] / k) for name, k in clips.items()) / weights)
    loss = sum(rises[name] * ((found.clips[name] / k) ** 2 - 1) for name, k in clips.items()) if rises else None
    told = "loss not measured" if loss is None else f"loss {loss:+.5f} nats a token by the model"
    return f"steps x{ratio:.4f}, {told}, {found.codings} codings"
