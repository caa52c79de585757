"""The processes of a run: one a device, started by `torchrun` or alone, on NCCL or gloo."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks (gloo has no average)."""
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def agree(self, *numbers: float) -> list[float]:
        """The first rank's numbers, on every rank. They travel as a CPU tensor, so no GPU is waited for."""
        if self.world_size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.world_size == 1:
            return flag
        shared = torch.tensor(int(flag))
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)


@contextlib.contextmanager
def launch(device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes of this run, which `torchrun` names through the environment; leave them at the end."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE=cuda: no CUDA device here; accepted are auto and cpu (`pgolf doctor` tells why)")
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} here; lower --nproc_per_node"
        )
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if world_size == 1:
        yield Ranks(rank, world_size, where)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Ranks(rank, world_size, where)
    finally:
        dist.destroy_process_group()
