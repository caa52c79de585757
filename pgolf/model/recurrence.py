"""Depth recurrence: a span of layers run several times over, with the same weights. PRs #1204, #1394.

NUM_LOOPS more passes over layers LOOP_START … LOOP_END make, with 11 layers and NUM_LOOPS=2, LOOP_START=3,
LOOP_END=5: 0 1 2 | 3 4 5 | 3 4 5 | 3 4 5 | 6 7 8 9 10. The skips' two halves are those of this longer sequence, so
there are more of them; while looping is off the first ones are used.
"""

from typing import NamedTuple


class Visit(NamedTuple):
    """One layer run once."""

    layer: int
    skip: int | None  # which skip weight brings back an earlier output, added before the layer
    stores: bool  # whether the output returns later, as a skip
    second_half: bool


def layer_sequence(layers: int, loops: int, start: int, end: int) -> list[int]:
    """The layers in the order in which they run; `loops` more passes over `start` to `end`, both included."""
    span = list(range(start, end + 1)) if loops else []
    return [*range(start if loops else 0), *span * (loops + 1), *range(end + 1 if loops else 0, layers)]


def visits(layers: int, loops: int, start: int, end: int, skips: bool) -> tuple[Visit, ...]:
    sequence = layer_sequence(layers, loops, start, end)
    half = len(sequence) // 2
    return tuple(
        Visit(layer, i - half if skips and half <= i < 2 * half else None, skips and i < half, i >= half)
        for i, layer in enumerate(sequence)
    )
