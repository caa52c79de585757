"""The launches that a sweep tries, and the tables that they stand in.

A candidate is an entry of a kernel module's `LAUNCHES`, as it would stand there. Behind the present one come the most
promising. All were compiled for sm_90 with Triton 3.6 and 3.9 (`python -m bench.visit.sweeps FAMILY --static`); none
spills or takes more shared memory than a block may have. Dropped for spills: the loss with 80 registers (Triton 3.6: 4)
and with 32 values a thread and 48 registers (3.9: 2), qkv_norm_rope's backward with (2048, 8, 1) (3.9: 2).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from bench.visit import sweep_calls as calls
from bench.visit.sweep_calls import Sizes, Timed
from pgolf.triton_kernels import (
    embedding_smear_norm,
    leaky_relu2_mlp,
    newton_schulz,
    qk_norm_rope,
    residual_rms_norm,
    softcapped_cross_entropy,
    two_lane_rms_norm,
    xsa_gate,
)
from pgolf.triton_kernels.row_launches import RowLaunch

Mlp, Loss, Square = leaky_relu2_mlp.Launch, softcapped_cross_entropy.Launch, newton_schulz.Launch
STAGES = ("up_stages", "gradient_stages")  # of Mlp, a place each
EVERY_BLOCK = 1 << 12  # programs a multiprocessor: so many that each has one block

# Tile, warps, stages, behind those in use. Programs a multiprocessor go with the tile, so that as many values are in
# work; then half as many, twice as many and one a block are tried at what was best.
ROWS = {
    "residual_rms_norm": (
        (1024, 4, 2),
        (1024, 4, 3),
        (512, 2, 1),
        (512, 2, 2),
        (2048, 8, 1),
        (2048, 8, 2),
        (512, 4, 1),
    ),
    "two_lane_rms_norm": ((512, 4, 2), (512, 2, 1), (512, 2, 2), (1024, 8, 1), (1024, 8, 2), (512, 4, 3), (1024, 4, 1)),
    "qk_norm_rope": ((2048, 4, 2), (1024, 4, 1), (1024, 2, 1), (1024, 4, 2), (4096, 8, 1), (2048, 4, 3)),
    "xsa_gate": ((1024, 4, 1), (1024, 2, 1), (2048, 8, 1), (4096, 8, 1), (512, 2, 1)),
    "embedding_smear_norm": ((512, 2, 1), (2048, 8, 1), (512, 4, 1)),
}
LOSS = (  # largest block, values a thread, registers of the gradient at most
    Loss(16384, 32),
    Loss(16384, 16),
    Loss(16384, 128),
)
MLP = (  # tokens, hidden units, inner, warps, stages of up and of gradient, programs a multiprocessor
    Mlp(128, 128, 64, 8, 3, 2, 2),
    Mlp(256, 128, 64, 8, 4, 3),
    Mlp(128, 128, 64, 4, 3, 2, 2),
    Mlp(128, 256, 64, 8, 3, 2),
    Mlp(256, 128, 64, 8, 3, 2),
    Mlp(128, 128, 64, 8, 4, 4),
    Mlp(128, 128, 64, 8, 2, 2, 2),
    Mlp(64, 256, 64, 4, 2, 2, 2),
    Mlp(128, 128, 128, 8, 3, 2),
    Mlp(128, 256, 32, 8, 6, 5),
)
LARGE = (  # side, inner, warps, stages
    Square(128, 64, 8, 4),
    Square(128, 64, 8, 2),
    Square(128, 64, 4, 3),
    Square(128, 128, 8, 2),
    Square(128, 64, 8, 5),
    Square(128, 32, 8, 5),
)
SMALL = (
    Square(64, 64, 4, 3),
    Square(64, 64, 4, 6),
    Square(64, 128, 4, 3),
    Square(64, 128, 4, 4),
    Square(64, 64, 8, 4),
    Square(64, 64, 4, 2),
)


@dataclass(frozen=True)
class Table:
    """The entry of one module's `LAUNCHES`."""

    name: str
    module: ModuleType
    key: tuple  # behind the architecture
    candidates: tuple[Any, ...]  # the first is in use
    timed: tuple[Timed, ...]
    tolerance: float  # relative error of a result, of what is computed in bfloat16
    slot: int | None = None  # where the entry is a tuple of launches

    def entry(self, candidate: Any) -> Any:
        if self.slot is None:
            return candidate
        present = list(in_use(self.module, self.key))
        present[self.slot] = candidate
        return tuple(present)


def in_use(module: ModuleType, key: tuple) -> Any:
    return module.LAUNCHES[(90, *key) if key else 90]


def families(sizes: Sizes) -> dict[str, Callable[[], list[Table]]]:
    return {
        "glue": lambda: glue(sizes),
        "loss": lambda: [loss(sizes)],
        "mlp": lambda: [mlp(sizes)],
        "newton_schulz": lambda: squares(sizes),
    }


def scaled(launch: RowLaunch, tile: int, num_warps: int, stages: int) -> RowLaunch:
    resident = tuple(max(1, programs * launch.tile // tile) for programs in launch.resident)
    return RowLaunch(tile, num_warps, resident, stages)


def other_residents(launch: RowLaunch) -> list[RowLaunch]:
    """With other numbers of programs; one a block only where no partial sums are left."""
    if not launch.resident:
        return []
    backward = launch.resident[1:]
    return [
        replace(launch, resident=resident)
        for resident in (
            tuple(2 * programs for programs in launch.resident),
            (EVERY_BLOCK, *(max(1, 3 * programs // 2) for programs in backward)),
            tuple(max(1, programs // 2) for programs in launch.resident),
        )
    ]


def joined(candidate: Any, place: int | None, other: Any) -> Any:
    """`candidate` with what `other`, alike in all else, holds for the kernel of that place."""
    if place is None:
        return candidate
    if isinstance(candidate, Mlp):
        return replace(candidate, **{field: getattr(other, field) for field in (STAGES[place],)})
    resident = list(candidate.resident)
    resident[place] = other.resident[place]
    return replace(candidate, resident=tuple(resident))


def apart(candidate: Any) -> Any:
    """What all kernels of a table share."""
    if isinstance(candidate, Mlp):
        return replace(candidate, **dict.fromkeys(STAGES, 0))
    return replace(candidate, resident=()) if isinstance(candidate, RowLaunch) else candidate


def glue(sizes: Sizes) -> list[Table]:
    def table(name: str, module: ModuleType, timed: tuple[Timed, ...]) -> Table:
        present = in_use(module, ())
        others = (scaled(present, *numbers) for numbers in ROWS[name])
        return Table(name, module, (), (present, *others), timed, 2e-2)

    return [
        table("residual_rms_norm", residual_rms_norm, calls.residuals(sizes)),
        table("qk_norm_rope", qk_norm_rope, calls.heads(sizes)),
        table("xsa_gate", xsa_gate, calls.gates(sizes)),
        table("two_lane_rms_norm", two_lane_rms_norm, calls.lanes(sizes)),
        table("embedding_smear_norm", embedding_smear_norm, calls.embeddings(sizes)),
    ]


def loss(sizes: Sizes) -> Table:
    module = softcapped_cross_entropy
    return Table("softcapped_cross_entropy", module, (), (in_use(module, ()), *LOSS), calls.losses(sizes), 1e-2)


def mlp(sizes: Sizes) -> Table:
    present = in_use(leaky_relu2_mlp, (2,))
    return Table("leaky_relu2_mlp", leaky_relu2_mlp, (2,), (present, *MLP), calls.products(sizes), 1e-2)


def squares(sizes: Sizes) -> list[Table]:
    """Large tiles for full banks, small ones for one rank's eighth; what the other tile does is timed beside."""
    large, small = in_use(newton_schulz, (2,))
    return [
        Table("newton_schulz large", newton_schulz, (2,), (large, *LARGE), calls.squares(sizes, 128, 1, 0), 5e-2, 0),
        Table("newton_schulz small", newton_schulz, (2,), (small, *SMALL), calls.squares(sizes, 64, 0, 1), 5e-2, 1),
    ]
