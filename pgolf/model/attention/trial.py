"""An attention tried in a process of its own: somebody's compiler may crash there, or never return.

    python -m pgolf.model.attention.trial flash4 cuda:0 bfloat16

runs it forward and backward on two short documents and ends with 0 if both are near the definition. With some versions
of its compiler the backward pass of FlashAttention 4 never returned, so it is chosen only after this.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from pgolf.errors import one_line
from pgolf.model.attention import flash
from pgolf.model.attention.plain import by_rows, plain

TRIAL_SECONDS = 120.0  # importing torch and compiling two kernels; a guess, not measured
NEAR = 0.05  # of the largest value: bfloat16 in another order of sums, not another result
LOAD = {"flash3": flash.load_flash3, "flash4": flash.load_flash4, "varlen": flash.load_varlen}


def try_in_process(command: Sequence[str], seconds: float = TRIAL_SECONDS) -> str:
    """Run `command`; "" if it ends with status 0 within `seconds`, else why not, in one line. Nothing of it stays."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe could be held open by what it has started
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"its trial, forward and backward, did not end within {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a kernel that hangs may hold it back
                process.wait(10)
        if status == 0:
            return ""
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return one_line(f"its trial, forward and backward, {ended}" + (f": {lines[-1]}" if lines else ""), 200)


@functools.cache
def failure(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `name` does not work on `device`, in one line, or "". Tried once a process."""
    return try_in_process([sys.executable, "-m", __name__, name, str(device), str(dtype).removeprefix("torch.")])


def difference(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """How far results and gradients are from the definition, by each one's largest value."""
    attend = LOAD[name]()
    generator = torch.Generator().manual_seed(0)
    borders, longest = torch.tensor([0, 100, 256], dtype=torch.int32, device=device), 156
    q, k, v, gradient = (
        torch.randn(256, heads, 64, generator=generator).to(device, dtype).requires_grad_() for heads in (8, 4, 4, 8)
    )
    y = attend(q, k, v, borders, longest)
    found = (y, *torch.autograd.grad(y, (q, k, v), gradient))
    exact = [x.detach().float().unsqueeze(0).requires_grad_() for x in (q, k, v)]
    y = by_rows(plain, exact[0], exact[1], exact[2], borders, longest)
    wanted = (y, *torch.autograd.grad(y, exact, gradient.float().unsqueeze(0)))
    ratios = [((a.float() - b[0]).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]
    return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


def main(name: str, device: str, dtype: str) -> None:
    off = difference(name, torch.device(device), getattr(torch, dtype))
    if off > NEAR:
        sys.exit(f"{name} is off by {off:.3g} of the largest value")


if __name__ == "__main__":
    main(*sys.argv[1:])
