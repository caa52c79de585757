"""Turns at the device: one process times while the others compile.

A part of a visit has a socket to the visit's clock. It says "want", waits for "go", measures, and says "done". Where
there is no visit there is nothing to wait for.
"""

import contextlib
import os
import socket
from collections.abc import Iterator

SOCKET = "PGOLF_TURNS"  # environment: the inherited descriptor
WANT, GO, DONE = b"w", b"g", b"d"

_holding = False


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Measure inside it. Nests. The visit that ends meanwhile ends this process."""
    global _holding
    if SOCKET not in os.environ or _holding:
        yield
        return
    with socket.socket(fileno=os.dup(int(os.environ[SOCKET]))) as clock:
        clock.sendall(WANT)
        if clock.recv(1) != GO:
            raise SystemExit("the visit is over")
        _holding = True
        try:
            yield
        finally:
            _holding = False
            clock.sendall(DONE)
