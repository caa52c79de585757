"""How evenly the banks' matrices are shared, for each number of ranks.

python -m bench.studies.balance
"""

import math
from collections.abc import Iterable, Sequence

from pgolf.training.sharding import Plan, Shape, cost, least_possible, loads

RECORD = [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)]  # banks (matrices, rows, columns)


def balance_table(shapes: Sequence[Shape], world_sizes: Iterable[int] = range(1, 17), steps: int = 5) -> str:
    """For each number of ranks: GFLOPs a rank, the busiest over the mean, the least any assignment could reach, what
    bank by bank padded to the number of ranks would cost, and the padding of the buffers that travel."""
    lines = ["| ranks | GFLOP a rank, least to most | most / mean | bound | bank by bank, padded | bytes padded |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    elements = sum(math.prod(shape) for shape in shapes)
    for world_size in world_sizes:
        work = loads(shapes, world_size, steps)
        mean = sum(work) / world_size
        padded = sum(-(-shape[0] // world_size) * cost(shape, steps) for shape in shapes)
        travelling = Plan(shapes, world_size, steps).length * world_size
        lines.append(
            f"| {world_size} | {min(work) / 1e9:.1f} to {max(work) / 1e9:.1f} | {max(work) / mean:.4f} "
            f"| {least_possible(shapes, world_size, steps) / mean:.4f} | {padded / mean:.3f} "
            f"| {100 * (travelling / elements - 1):.1f}% |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(balance_table(RECORD))
