"""Which rank works on which matrices of the banks, and the buffers in which they travel between ranks.

Matrices are dealt out one by one by their FLOPs, over all banks together, so that no rank waits for another and no
padding is computed. A rank's matrices lie end to end in its *string*, costliest shape first, equal shapes adjacent.
Collectives move segments of all strings at once; a segment ends where a shape ends, even inside another rank's matrix,
so that only the ends of short strings are padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pgolf.runtime.ranks import Pending, Ranks

Shape = tuple[int, int, int]  # of a bank: count, rows, columns
ENOUGH = 1.02  # times the least possible load


@dataclass(frozen=True)
class Stretch:
    """Neighbouring matrices of one bank on one rank; `offset` counts elements from the start of the rank's string."""

    bank: int
    first: int
    count: int
    rank: int
    offset: int


@dataclass(frozen=True)
class Cut:
    """Elements [start, stop) of a flattened bank lie at [at, at + stop - start) of a buffer."""

    bank: int
    start: int
    stop: int
    at: int


def as_bank(matrices: Tensor) -> Tensor:
    """A view with three dimensions: a matrix (rows, columns) is a bank of one."""
    return matrices if matrices.ndim == 3 else matrices.unsqueeze(0)


class Plan:
    """The strings of all ranks for banks of `shapes`, which Newton-Schulz iterates `steps` times.

    With `columns`, the strings of a quantity that has so many numbers a row, for the same owners.
    """

    def __init__(self, shapes: Sequence[Shape], world_size: int, steps: int = 5, columns: int | None = None):
        self.world_size, self.counts = world_size, assign(shapes, world_size, steps)
        self.shapes = [(count, rows, columns or width) for count, rows, width in shapes]
        self.sizes = [rows * width for _, rows, width in self.shapes]  # of one matrix
        by_shape: dict[tuple[int, int], list[int]] = {}
        for bank in sorted(range(len(shapes)), key=lambda bank: -cost(shapes[bank], steps)):
            by_shape.setdefault(shapes[bank][1:], []).append(bank)
        self.batches = list(by_shape.values())  # banks of one shape, orthogonalised together
        self.stretches: list[Stretch] = []
        self.ends: list[list[int]] = []  # [rank][batch]: where it ends in the string
        for rank in range(world_size):
            offset, ends = 0, []
            for banks in self.batches:
                for bank in banks:
                    count = self.counts[bank][rank]
                    if count:
                        self.stretches.append(Stretch(bank, sum(self.counts[bank][:rank]), count, rank, offset))
                    offset += count * self.sizes[bank]
                ends.append(offset)
            self.ends.append(ends)
        self.length = max(ends[-1] for ends in self.ends)  # of the longest string

    def range(self, rank: int, batch: int) -> tuple[int, int]:
        """Where a batch begins and ends in a rank's string."""
        return (self.ends[rank][batch - 1] if batch else 0), self.ends[rank][batch]

    def scatter_bounds(self) -> list[int]:
        """Ends of segments such that with segment b every rank holds its whole batch b."""
        return [max(ends[batch] for ends in self.ends) for batch in range(len(self.batches))]

    def gather_bounds(self) -> list[int]:
        """Ends of segments such that with batch b done every rank can send segment b; the last is the padded end."""
        ends = [min(ends[batch] for ends in self.ends) for batch in range(len(self.batches))]
        return [*ends[:-1], self.length]

    def cuts(self, bounds: Sequence[int]) -> list[list[Cut]]:
        """For each segment: which parts of the banks lie where in a buffer [segment][rank][element]."""
        segments = []
        for begin, end in zip([0, *bounds], bounds, strict=False):
            cuts = []
            for s in self.stretches:
                low, high = max(s.offset, begin), min(s.offset + s.count * self.sizes[s.bank], end)
                if low < high:
                    shift = s.first * self.sizes[s.bank] - s.offset
                    at = begin * self.world_size + s.rank * (end - begin) + low - begin
                    cuts.append(Cut(s.bank, low + shift, high + shift, at))
            segments.append(cuts)
        return segments


def cost(shape: Shape, steps: int) -> int:
    """FLOPs of one matrix of a bank."""
    from pgolf.ops.newton_schulz import flops

    return flops(shape[1], shape[2], steps)


@lru_cache(maxsize=64)
def _assign(shapes: tuple[Shape, ...], world_size: int, steps: int) -> list[list[int]]:
    costs = [cost(shape, steps) for shape in shapes]
    counts = _by_greed(shapes, costs, world_size)
    least, reached = least_possible(shapes, world_size, steps), max(_sums(counts, costs))
    if reached > ENOUGH * least:
        for capacity in torch.arange(1.005 * least, reached, 0.005 * least, dtype=torch.float64).tolist():
            filled = _by_filling(shapes, costs, world_size, capacity)
            if filled:
                return filled
    return counts


def assign(shapes: Sequence[Shape], world_size: int, steps: int = 5) -> list[list[int]]:
    """[bank][rank]: how many of the bank's matrices the rank works on. Every rank computes the same answer.

    By greed; where that leaves the busiest rank 2% above the least possible, by filling one rank after the other with
    what comes closest to a load, for the lowest load with which all matrices find a place. (Greed sends fewer bytes.)
    """
    return _assign(tuple(shapes), world_size, steps)


def _by_greed(shapes: Sequence[Shape], costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Costliest first to the rank with the least; then the busiest rank exchanges one matrix for a cheaper one, or for
    none, with any rank, as long as that lowers the larger load of the two."""
    counts = [[0] * world_size for _ in shapes]
    loads = [0] * world_size
    for bank in sorted(range(len(shapes)), key=lambda bank: -costs[bank]):
        for _ in range(shapes[bank][0]):
            rank = loads.index(min(loads))
            counts[bank][rank] += 1
            loads[rank] += costs[bank]

    def best_exchange() -> tuple[int, int, int, int | None] | None:
        busy = loads.index(max(loads))
        best, found = loads[busy], None
        for given in (bank for bank in range(len(shapes)) if counts[bank][busy]):
            for other in range(world_size):
                for taken in (None, *(bank for bank in range(len(shapes)) if counts[bank][other])):
                    moved = costs[given] - (0 if taken is None else costs[taken])
                    worst = max(loads[busy] - moved, loads[other] + moved)
                    if other != busy and worst < best:
                        best, found = worst, (busy, other, given, taken)
        return found

    while exchange := best_exchange():
        busy, other, given, taken = exchange
        for moved, giver, taker in ((given, busy, other), (taken, other, busy)):
            if moved is not None:
                counts[moved][giver] -= 1
                counts[moved][taker] += 1
                loads[giver] -= costs[moved]
                loads[taker] += costs[moved]
    return counts


def _by_filling(
    shapes: Sequence[Shape], costs: Sequence[int], world_size: int, capacity: float
) -> list[list[int]] | None:
    """Each rank in turn takes what comes closest to `capacity` from below; None if matrices are left over."""
    left = [shape[0] for shape in shapes]
    counts: list[list[int]] = [[] for _ in shapes]
    grain = capacity / 400  # sums that differ by less count as one
    order = sorted(range(len(shapes)), key=lambda bank: -costs[bank])
    for _ in range(world_size):
        choices: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # sum in grains -> sum, how many of each
        for bank in order:
            wider: dict[int, tuple[int, tuple[int, ...]]] = {}
            for load, taken in choices.values():
                for k in range(min(left[bank], int((capacity - load) // costs[bank])), -1, -1):
                    total = load + k * costs[bank]
                    wider.setdefault(int(total / grain), (total, (*taken, k)))
            choices = wider
        _, best = max(choices.values())
        for bank, k in zip(order, best, strict=True):
            counts[bank].append(k)
            left[bank] -= k
    return None if any(left) else counts


def _sums(counts: Sequence[Sequence[int]], costs: Sequence[int]) -> list[int]:
    return [sum(c * k for c, k in zip(costs, column, strict=True)) for column in zip(*counts, strict=True)]


class Part:
    """A quantity of one rank's matrices: momentum, say. `data` is the string."""

    def __init__(self, plan: Plan, rank: int, data: Tensor):
        self.plan, self.rank, self.data = plan, rank, data
        self.stretches = [s for s in plan.stretches if s.rank == rank]

    def batch(self, batch: int) -> Tensor:
        """(count, rows, columns), a view."""
        begin, end = self.plan.range(self.rank, batch)
        return self.data[begin:end].view(-1, *self.plan.shapes[self.plan.batches[batch][0]][1:])

    def matrices(self, s: Stretch) -> Tensor:
        """(count, rows, columns), a view."""
        return self.data[s.offset : s.offset + s.count * self.plan.sizes[s.bank]].view(
            s.count, *self.plan.shapes[s.bank][1:]
        )

    def whole(self, ranks: Ranks) -> list[Tensor]:
        """The quantity for whole banks, on every rank."""
        gathered = self.data
        if ranks.world_size > 1:
            padded = self.data.new_zeros(self.plan.length)
            padded[: len(self.data)] = self.data
            gathered = self.data.new_empty(self.plan.length * ranks.world_size)
            ranks.begin_all_gather(gathered, padded).wait()
        banks = [self.data.new_empty(shape) for shape in self.plan.shapes]
        (cuts,) = self.plan.cuts([self.plan.length])
        for target, source in zip(_in_banks(cuts, banks), _in_buffer(cuts, gathered), strict=True):
            target.copy_(source)
        return banks

    def take(self, banks: Sequence[Tensor]) -> None:
        """The inverse of `whole`; a bank of one may come as a matrix."""
        for s in self.stretches:
            self.matrices(s).copy_(as_bank(banks[s.bank])[s.first : s.first + s.count])


class Exchange:
    """Gradients to the owners of the matrices, updates from them. One rank keeps gradients and updates in place.

    `banks` are (count, rows, columns), or (rows, columns) for a bank of one; updates have three dimensions.
    """

    def __init__(self, banks: Sequence[Tensor], ranks: Ranks, steps: int, dtype: torch.dtype):
        self.banks, self.ranks = banks, ranks
        self.plan = plan = Plan([tuple(as_bank(bank).shape) for bank in banks], ranks.world_size, steps)  # type: ignore[misc]
        new = banks[0].detach().new_zeros
        self.updates = Part(plan, ranks.rank, new(plan.length, dtype=dtype))
        if ranks.world_size == 1:
            return
        self.gradients = Part(plan, ranks.rank, new(plan.length))
        self.outgoing = new(plan.length * ranks.world_size)
        self.incoming = new(plan.length * ranks.world_size, dtype=dtype)
        self.scatter_bounds, self.gather_bounds = plan.scatter_bounds(), plan.gather_bounds()
        self.scatter_cuts = plan.cuts(self.scatter_bounds)
        self.scatter_targets = [_in_buffer(cuts, self.outgoing) for cuts in self.scatter_cuts]
        self.whole_updates = [new(shape, dtype=dtype) for shape in plan.shapes]
        arriving = plan.cuts(self.gather_bounds)
        self.unpacking = [(_in_banks(cuts, self.whole_updates), _in_buffer(cuts, self.incoming)) for cuts in arriving]
        last = {cut.bank: segment for segment, cuts in enumerate(arriving) for cut in cuts}
        self.complete = [[bank for bank in last if last[bank] == segment] for segment in range(len(arriving))]

    def begin_scatter(self) -> list[Pending]:
        """One reduce-scatter a batch of the plan; `gradients` then holds the sums for this rank's matrices."""
        scattering: list[Pending] = []
        if self.ranks.world_size == 1:
            return scattering
        gradients = [bank.grad.contiguous() for bank in self.banks]  # type: ignore[union-attr]
        begin = 0
        for end, cuts, targets in zip(self.scatter_bounds, self.scatter_cuts, self.scatter_targets, strict=True):
            if begin < end:
                torch._foreach_copy_(targets, _in_banks(cuts, gradients))
                part = self.outgoing[begin * self.ranks.world_size : end * self.ranks.world_size]
                scattering.append(self.ranks.begin_reduce_scatter(self.gradients.data[begin:end], part))
            else:
                scattering.append(Pending(self.ranks.rank))
            begin = end
        return scattering

    def parts(self, batch: int, momentum: Part) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(gradient, momentum, update) of this rank's matrices of a batch, in one piece or, unpacked, by bank."""
        if self.ranks.world_size > 1:
            if len(momentum.batch(batch)):
                yield self.gradients.batch(batch), momentum.batch(batch), self.updates.batch(batch)
            return
        for s in self.updates.stretches:
            if s.bank in self.plan.batches[batch]:
                gradient = self.banks[s.bank].grad
                assert gradient is not None
                yield as_bank(gradient), momentum.matrices(s), self.updates.matrices(s)

    def begin_gather(self, batch: int) -> Pending:
        """Send what all ranks have ready once they have done this batch."""
        if self.ranks.world_size == 1:
            return Pending(self.ranks.rank)
        begin, end = (self.gather_bounds[batch - 1] if batch else 0), self.gather_bounds[batch]
        if begin == end:
            return Pending(self.ranks.rank)
        part = self.incoming[begin * self.ranks.world_size : end * self.ranks.world_size]
        return self.ranks.begin_all_gather(part, self.updates.data[begin:end])

    def unpack(self, segment: int) -> list[tuple[int, Tensor]]:
        """(bank, update of all its matrices) for every bank that is complete with this segment."""
        if self.ranks.world_size == 1:
            own = self.updates
            return [(s.bank, own.matrices(s)) for s in own.stretches if s.bank in self.plan.batches[segment]]
        targets, sources = self.unpacking[segment]
        if targets:
            torch._foreach_copy_(targets, sources)
        return [(bank, self.whole_updates[bank]) for bank in self.complete[segment]]


def _in_banks(cuts: Sequence[Cut], banks: Sequence[Tensor]) -> list[Tensor]:
    flat = [bank.view(-1) for bank in banks]
    return [flat[cut.bank][cut.start : cut.stop] for cut in cuts]


def _in_buffer(cuts: Sequence[Cut], buffer: Tensor) -> list[Tensor]:
    return [buffer[cut.at : cut.at + cut.stop - cut.start] for cut in cuts]


def loads(shapes: Sequence[Shape], world_size: int, steps: int = 5) -> list[int]:
    """FLOPs that each rank spends in one optimiser step."""
    return _sums(assign(shapes, world_size, steps), [cost(shape, steps) for shape in shapes])


def least_possible(shapes: Sequence[Shape], world_size: int, steps: int = 5) -> float:
    """A load that no assignment stays below: the mean; k matrices, where k - 1 a rank leave one over; and for the
    costliest shapes alone, whole multiples of their costs' common divisor."""
    costs = sorted((cost(shape, steps) for shape in shapes for _ in range(shape[0])), reverse=True)
    together = [(k // world_size + 1) * costs[k] for k in range(0, len(costs), world_size)]
    for least in set(costs):
        largest = [c for c in costs if c >= least]
        grain = math.gcd(*largest)
        together.append(-(-sum(largest) // (world_size * grain)) * grain)
    return max(sum(costs) / world_size, *together)
