"""Batches made ready in a thread while the device computes."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from pgolf.data.batch import Batch

DEPTH = 3  # batches ready or in the making


class Loader(Protocol):
    """What training needs of a source of batches."""

    def next_batch(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """A loader whose batches are read, pinned and sent to the device ahead of their use, by one thread.

    On CUDA the copy runs on a stream of its own and the current stream waits for it, not the host. The state is that of
    the batches given out, however many are ready. What the loader raises, `next_batch` raises.
    """

    def __init__(self, loader: Loader, device: torch.device):
        self.loader, self.device = loader, device
        self._state = loader.state_dict()
        self._ahead: deque[Future[tuple[Batch, dict[str, Any], Any]]] = deque()
        self._thread, self._stream = ThreadPoolExecutor(1, "prefetch"), None
        if device.type == "cuda":  # a new thread would begin on the first GPU, which is another rank's
            self._thread = ThreadPoolExecutor(1, "prefetch", torch.cuda.set_device, (device,))
            self._stream = torch.cuda.Stream(device)

    def next_batch(self) -> Batch:
        """The next batch, on the device."""
        while len(self._ahead) < DEPTH:
            self._ahead.append(self._thread.submit(self._prepare))
        batch, self._state, copied = self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._prepare))
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            batch.inputs.record_stream(current)
            batch.targets.record_stream(current)
        return batch

    def _prepare(self) -> tuple[Batch, dict[str, Any], Any]:
        batch = self.loader.next_batch()
        state = self.loader.state_dict()
        if self._stream is None:
            return batch, state, None
        with torch.cuda.stream(self._stream):
            return batch.pinned().to(self.device), state, self._stream.record_event()

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self._ahead:
            self._ahead.popleft().exception()  # done with, whatever it found
        self.loader.load_state_dict(state)
        self._state = self.loader.state_dict()

    def close(self) -> None:
        """Stop the thread."""
        while self._ahead:
            self._ahead.popleft().cancel()
        self._thread.shutdown()
