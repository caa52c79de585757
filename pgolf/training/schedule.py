"""What changes during training, as functions of the fraction of the budget that is used, of time or of steps."""

from dataclasses import dataclass

from pgolf.settings import Settings


@dataclass(frozen=True)
class Phase:
    """What the forward pass of a part of training looks like. Each is another graph for the compiler."""

    seq_len: int
    looping: bool
    quantized: bool

    @property
    def line(self) -> str:
        return f"seq_len:{self.seq_len} looping:{self.looping} quantized:{self.quantized}"


def used_fraction(iterations: int, step: int, elapsed_seconds: float, limit_seconds: float) -> float:
    """Of the steps or of the time, whichever runs out first; 0 to 1."""
    return min(1.0, max(step / iterations, elapsed_seconds / limit_seconds))


def lr_scale(settings: Settings, used: float) -> float:
    """1, then over the last WARMDOWN_FRAC of the budget a straight line to 0, MIN_LR at least."""
    if used <= 1.0 - settings.warmdown_frac:
        return 1.0
    return max((1.0 - used) / settings.warmdown_frac, settings.min_lr)


def fraction_where(settings: Settings, scale: float) -> float:
    """The fraction of the budget from which `lr_scale` is at most `scale`, one that it reaches."""
    return 0.0 if scale >= 1 else 1.0 - settings.warmdown_frac * scale


def phase_at(settings: Settings, used: float) -> Phase:
    stages = settings.train_seq_stages
    return Phase(
        seq_len=next((length for end, length in stages if used < end), stages[-1][1]),
        looping=settings.num_loops > 0 and used >= settings.enable_looping_at,
        quantized=settings.qat != "none" and used >= fraction_where(settings, settings.late_qat_threshold),
    )


def phases(settings: Settings) -> list[Phase]:
    """All that a run goes through, in order."""
    changes = [0.0, *(end for end, _ in settings.train_seq_stages), settings.enable_looping_at]
    changes.append(fraction_where(settings, settings.late_qat_threshold))
    return list(dict.fromkeys(phase_at(settings, used) for used in sorted(changes)))
