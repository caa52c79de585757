"""The processes of a run: one a device, started by `torchrun` or alone, on NCCL or gloo."""

import contextlib
import os
import re
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.errors import PgolfError, UserError, complain, one_line
from pgolf.runtime.files import make_folder, replacing

# New names since torch 2.13; gloo has both as well as NCCL.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class LostProcess(PgolfError):
    """Another process of this run died, or did not answer in time."""

    def __init__(self, rank: int, reason: str, when: str = ""):
        super().__init__(f"rank {rank} lost a fellow process{when}: {reason}")
        self.rank, self.reason = rank, reason

    def during(self, what: str) -> "LostProcess":
        return LostProcess(self.rank, self.reason, f" during {what}")


class Pending:
    """A collective under way. On CUDA `wait` makes the current stream wait, not the host."""

    def __init__(self, rank: int, work: Any = None):
        self.rank, self.work = rank, work

    def wait(self) -> None:
        if self.work is not None:
            work, self.work = self.work, None
            with _lost_peers_told(self.rank):
                work.wait()


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
        for pending in [self.begin_sum(tensor) for tensor in tensors]:
            pending.wait()

    def begin_sum(self, tensor: Tensor) -> Pending:
        if self.world_size == 1:
            return Pending(self.rank)
        return self._begin(dist.all_reduce, tensor)

    def begin_reduce_scatter(self, out: Tensor, of: Tensor) -> Pending:
        """`of` is this rank's (world_size, n), flat or not; `out` (n,) becomes the sum of all ranks' row `rank`."""
        return self._begin(_reduce_scatter, out, of)

    def begin_all_gather(self, out: Tensor, of: Tensor) -> Pending:
        """`out` (world_size, n), flat or not, becomes all ranks' `of` (n,)."""
        return self._begin(_all_gather, out, of)

    def _begin(self, collective: Any, *arguments: Any) -> Pending:
        with _lost_peers_told(self.rank):
            return Pending(self.rank, collective(*arguments, async_op=True))

    def share(self, *numbers: float, flag: bool = False) -> tuple[list[float], bool]:
        """The first rank's numbers, and whether `flag` is set on any rank, in one message of CPU numbers, so that no
        GPU is waited for."""
        if self.world_size == 1:
            return list(numbers), flag
        shared = torch.tensor([*(numbers if self.first else [0.0] * len(numbers)), float(flag)], dtype=torch.float64)
        self.sum_(shared)
        *values, flags = shared.tolist()
        return values, flags > 0

    def agree(self, *numbers: float) -> list[float]:
        """The first rank's numbers, on every rank."""
        return self.share(*numbers)[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.share(flag=flag)[1]

    def agree_bytes(self, content: bytes) -> bytes:
        """The first rank's, on every rank."""
        if self.world_size == 1:
            return content
        (size,) = self.agree(len(content))
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._begin(dist.broadcast, buffer, 0).wait()
        return buffer.numpy().tobytes()

    def agree_file(self, path: Path) -> None:
        """Where the file at `path` is missing or another, on another machine for instance, write the first rank's."""
        mine = path.read_bytes() if path.exists() else b""
        same = self.agree(len(mine), zlib.crc32(mine)) == [len(mine), zlib.crc32(mine)]
        if self.any(not same):
            content = self.agree_bytes(mine)
            if not same:
                make_folder(path.parent)
                with replacing(path) as file:
                    file.write(content)

    def alive(self, done: bool = False) -> None:
        """The first rank's sign of life for those in `wait_for_first`; `done` is the last one."""
        if self.world_size > 1:
            self._begin(dist.broadcast, torch.tensor([float(done)]), 0).wait()

    def wait_for_first(self) -> None:
        """On the other ranks: until the first one is done with what it does alone. It may take as long as it likes, but
        between two signs of life no longer than any answer."""
        done = torch.zeros(1)
        while not done:
            self._begin(dist.broadcast, done, 0).wait()

    def wait(self) -> None:
        """Until every rank is here."""
        self.sum_(torch.zeros(()))


@contextlib.contextmanager
def _lost_peers_told(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # also of NCCL; gloo has no class of its own
        line = str(error).partition("\n")[0]
        raise LostProcess(rank, re.sub(r"^\[[^]]*\]\s*", "", line).partition(". ")[0]) from error  # [file:line] first


def _place() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), as `torchrun` tells them; alone where it tells nothing."""
    found = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "0")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdecimal() and len(text) <= 6):
            raise UserError(f"{name}={one_line(text, 80)}: must be a whole number, which torchrun sets")
        found.append(int(text))
    rank, world_size, local_rank, _ = found
    if rank >= world_size:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size}: ranks are 0 to WORLD_SIZE - 1; torchrun sets both")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE={world_size} without {', '.join(missing)}; torchrun sets them all")
    return rank, world_size, local_rank


@contextlib.contextmanager
def _joining(rank: int, seconds: float) -> Iterator[None]:
    """End the process where torch waits without end: for a first rank that takes the connection and never answers,
    because it was stopped. Where torch does end its waiting, it is given time to say so first."""

    def end() -> None:
        complain("train_gpt.py", LostProcess(rank, f"no answer in {2 * seconds:g} s", " while joining it"))
        os._exit(2)

    timer = threading.Timer(2 * seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def launch(device: str = "auto", timeout_seconds: float = 300.0) -> Iterator[Ranks]:
    """Join the other processes of this run, which `torchrun` names through the environment; leave them at the end.

    A process that dies is noticed at once, because its connections close; one that hangs or whose machine is gone,
    after `timeout_seconds` in a collective.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE=cuda: no CUDA device here; accepted are auto and cpu (`pgolf doctor` tells why)")
    rank, world_size, local_rank = _place()
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
    with _lost_peers_told(rank), _joining(rank, timeout_seconds):
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    try:
        yield Ranks(rank, world_size, where)
    except LostProcess:
        raise  # destroying the group would wait for the lost one; the process ends anyway
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
