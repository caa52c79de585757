"""How the kernels between the matrix products are launched: blocks of whole rows, of about as many values each."""

from dataclasses import dataclass

import torch
import triton

from pgolf.triton_kernels.variants import architecture, programs

HOPPER_PROCESSORS = 132  # multiprocessors of an H100 or H200


@dataclass(frozen=True)
class RowLaunch:
    tile: int  # values of a block of rows
    num_warps: int
    # Programs that a multiprocessor holds at once, of the forward kernel and of each backward kernel. Where there are
    # any, a program goes over many blocks, so that few partial sums are left to add up; else each block has its own.
    resident: tuple[int, ...] = ()
    stages: int = 1  # blocks in flight in each such program: that many less one are loaded ahead, to shared memory

    def rows(self, width: int) -> int:
        """Rows of a block, each padded to a power of 2."""
        return max(self.tile // triton.next_power_of_2(width), 1)


def launch_on(device: torch.device, launches: dict[int, RowLaunch], safe: RowLaunch) -> RowLaunch:
    """The launch of the device's architecture, or the safe one."""
    return launches.get(architecture(device), safe)


def row_grid(device: torch.device, rows: int, block_rows: int, resident: int) -> tuple[int]:
    return (programs(device, triton.cdiv(rows, block_rows), resident),)


def row_grid_on_hopper(rows: int, block_rows: int, resident: int) -> int:
    """The size of `row_grid` where there is no device to ask."""
    return min(triton.cdiv(rows, block_rows), HOPPER_PROCESSORS * resident)
