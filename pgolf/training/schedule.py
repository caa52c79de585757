"""What changes during training, as functions of the fraction of the budget that is used, or of steps."""

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


@dataclass(frozen=True)
class Schedule:
    """Fractions are of the budget, of steps or of time, whichever runs out first."""

    warmdown_frac: float  # the last part, in which the learning rate falls
    min_lr: float  # what it falls to, as a fraction of itself
    seq_stages: tuple[tuple[float, int], ...]  # (fraction where it ends, sequence length) of each stage
    looping_from: float | None  # the fraction from which layers are looped; None: never
    quantized_below: float | None  # weights are rounded once the learning rate is this fraction of itself; None: never
    momentum: float  # Muon's, after its warm-up
    momentum_start: float
    momentum_warmup_steps: int

    @classmethod
    def of(cls, settings: Settings) -> "Schedule":
        s = settings
        return cls(
            warmdown_frac=s.warmdown_frac,
            min_lr=s.min_lr,
            seq_stages=tuple(s.train_seq_stages),
            looping_from=s.enable_looping_at if s.num_loops else None,
            quantized_below=None if s.qat == "none" else s.late_qat_threshold,
            momentum=s.muon_momentum,
            momentum_start=s.muon_momentum_warmup_start,
            momentum_warmup_steps=s.muon_momentum_warmup_steps,
        )

    def lr_scale(self, used: float) -> float:
        """1, then over the warm-down a straight line to 0, `min_lr` at least."""
        if used <= 1.0 - self.warmdown_frac:
            return 1.0
        return max((1.0 - used) / self.warmdown_frac, self.min_lr)

    def muon_momentum(self, step: int) -> float:
        """A straight line from `momentum_start` to `momentum`, over the first steps."""
        warm_up = self.momentum_warmup_steps
        fraction = min(step / warm_up, 1.0) if warm_up else 1.0
        return self.momentum_start + fraction * (self.momentum - self.momentum_start)

    @property
    def quantized_from(self) -> float | None:
        """The fraction from which weights are rounded."""
        below = self.quantized_below
        if below is None:
            return None
        return 0.0 if below >= 1 else 1.0 - self.warmdown_frac * below

    def quantized_progress(self, used: float) -> float:
        """How far training with rounded weights has come, 0 to 1; 0 before it begins."""
        start = self.quantized_from
        return 0.0 if start is None or used < start else (used - start) / max(1.0 - start, 1e-9)

    def phase_at(self, used: float) -> Phase:
        return Phase(
            seq_len=next((length for end, length in self.seq_stages if used < end), self.seq_stages[-1][1]),
            looping=_reached(self.looping_from, used),
            quantized=_reached(self.quantized_from, used),
        )

    def phases(self) -> list[Phase]:
        """All that a run goes through, in order."""
        changes = [0.0, *(end for end, _ in self.seq_stages)]
        changes += [start for start in (self.looping_from, self.quantized_from) if start is not None]
        return list(dict.fromkeys(self.phase_at(used) for used in sorted(changes)))


def used_fraction(iterations: int, step: int, elapsed_seconds: float, limit_seconds: float) -> float:
    """Of the steps or of the time, whichever runs out first; 0 to 1."""
    return min(1.0, max(step / iterations, elapsed_seconds / limit_seconds))


def _reached(start: float | None, used: float) -> bool:
    return start is not None and used >= start
