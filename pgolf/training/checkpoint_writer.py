"""When a run writes checkpoints, and how: beside its training, so that little more than a copy stops its clock."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.runtime.files import WriteError
from pgolf.training import checkpoint
from pgolf.training.checkpoint import CHECKPOINT, CheckpointError, State


class CheckpointWriter:
    """Of the first rank. One that cannot be written is told in a line, and those before it stay."""

    def __init__(self, folder: Path, log: Callable[[str], Any], warn: Callable[[str], Any]):
        self.path, self.log, self.warn = folder / CHECKPOINT, log, warn
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[tuple[int, float]] | None = None
        self.told = ""  # about the one that is being written
        self.buffers: list[Tensor] = []  # on the host
        self.keep_old = True  # False while the newest file is a damaged one
        self.count, self.stopped_seconds = 0, 0.0

    def begin(self, state: State, since: float) -> None:
        """Copy `state` to the host, which is all that the caller waits for, and have it written. The training clock
        has stood still `since` then (time.perf_counter), and does until this returns."""
        if self.pending and not self.pending.done():
            self.warn(f"checkpoint of step {state['step']} left out: the one before it is still being written")
            return
        self.settle()
        copy = self._on_host(state)
        stopped = time.perf_counter() - since
        self.stopped_seconds += stopped
        self.told = f"step:{state['step']} clock_stopped:{1000 * stopped:.0f}ms"
        self.pending = self.thread.submit(self._write, copy)

    def write(self, state: State) -> None:
        """At once."""
        self.settle()
        self.told = f"step:{state['step']}"
        self.pending = Future()
        try:
            self.pending.set_result(self._write(state))
        except Exception as error:
            self.pending.set_exception(error)
        self.settle()

    def settle(self) -> None:
        """Wait for the one that is being written, and tell of it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            size, seconds = pending.result()
        except (CheckpointError, WriteError) as error:
            self.warn(f"{error}; the run goes on without this checkpoint")
            return
        self.count, self.keep_old = self.count + 1, True
        self.log(f"checkpoint: {self.told} written:{1000 * seconds:.0f}ms bytes:{size}")

    def _write(self, state: State) -> tuple[int, float]:
        begin = time.perf_counter()
        size = checkpoint.save(self.path, state, self.keep_old)
        return size, time.perf_counter() - begin

    def _on_host(self, state: State) -> State:
        """The same with every tensor in a buffer of its own, pinned where that makes copies from a GPU faster."""
        tensors = list(checkpoint.tensors_in(state))
        if [(b.shape, b.dtype) for b in self.buffers] != [(t.shape, t.dtype) for t in tensors]:
            self.buffers = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        copies = iter(self.buffers)
        return checkpoint.with_tensors(state, lambda tensor: next(copies))
