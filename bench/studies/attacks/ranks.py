"""Runs of two processes, one of which is killed or stopped in each phase: the other must end by itself, say why in one
line, and leave what can be gone on with.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.studies.attacks.lives import Life, Lost, Usual, attempts
from bench.studies.attacks.outcomes import ROOT, watch
from bench.studies.attacks.sittings import Sitting, preload, real

# Of the first rank. "torchrun" is a whole run under it, started as a user does; one of its workers is killed.
PHASES = (
    "torchrun", "start", "data", "model", "warm-up", "training", "checkpoint", "calibration", "quantization",
    "artifact", "scoring", "summary", "report",
)  # fmt: skip
LOSSES = 4  # of a rank, before the run may end
STRIDE = 5  # between the phases of one life
TIMEOUT_SECONDS = 3.0  # PROCESS_TIMEOUT_SECONDS
END_SECONDS = 25.0  # for the other one
TORCHRUN_SECONDS = 10.0  # in which it starts, trains and scores


def ranks(seconds: float, seed: int) -> Counter[str]:
    """A seed is a run that loses a rank `LOSSES` times."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "bench.studies.attacks.ranks", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return watch("ranks", lambda at: [*start, str(at)], seconds, seed, environment)


def pair(life: Life) -> list[Sitting]:
    """Two ranks, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        life.train({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output=f"output{rank}") for rank in (0, 1)
    ]


def lead(folder: Path, seed: int, usual: Usual) -> Iterator[str]:
    """The phases in which the ranks of one life were lost. `Lost` says what went wrong."""
    chance = random.Random(seed)
    life = Life(folder / str(seed), PROCESS_TIMEOUT_SECONDS=str(TIMEOUT_SECONDS))
    fell: list[str] = []
    for place in sorted((seed * LOSSES + number) * STRIDE % len(PHASES) for number in range(LOSSES)):
        victim, number = chance.choice([(rank, n) for rank in (0, 1) for n in (signal.SIGKILL, signal.SIGSTOP)])
        what = f"{PHASES[place]}, rank {victim}, {signal.Signals(number).name}"
        if PHASES[place] == "torchrun":
            what = under_torchrun(life, chance)
        else:
            what = lose(life, PHASES[place], victim, number, chance, usual)
        problem = life.problem()
        if problem:
            raise Lost("lost run", f"{what}: {problem}")
        fell.append(what)
        yield ""
    life.end_well(usual, ", ".join(fell))
    yield from (what.partition(",")[0] for what in fell)


def lose(life: Life, phase: str, victim: int, number: int, chance: random.Random, usual: Usual) -> str:
    """Lose a rank; where that was."""
    if phase == "data":  # made anew
        shutil.rmtree(life.folder / "data", ignore_errors=True)
    sittings = pair(life)
    lost, other = sittings[victim], sittings[1 - victim]
    if sittings[0].until(phase, chance.randint(1, 3) if phase == "checkpoint" else 1):
        time.sleep(chance.random() * usual.seconds[phase])
    lost.send(number)
    sittings[0].signalled = lost.signalled
    goes_on = number == signal.SIGSTOP and chance.random() < 0.5
    what = f"{phase}, rank {victim}, {signal.Signals(number).name}{' and SIGCONT' * goes_on}"
    try:
        check_end(other, what)
    except TimeoutError:
        lost.send(signal.SIGKILL)
        lost.end()
        raise Lost("hang", f"{what}: the other did not end in {END_SECONDS:g} s") from None
    lost.send(signal.SIGCONT if goes_on else signal.SIGKILL)
    try:
        if goes_on:
            check_end(lost, what)
        else:
            lost.end()
    except TimeoutError:
        raise Lost("hang", f"{what}: it did not end in {END_SECONDS:g} s") from None
    return what.replace(phase, sittings[0].phase, 1)


def check_end(sitting: Sitting, what: str) -> None:
    """It must end by itself, with status 0 when it was through, or with one line on the process that it lost."""
    status = sitting.end(END_SECONDS)
    trace = sitting.trace()
    if trace:
        raise Lost("crash", f"{what}: {trace}")
    told = [line for line in sitting.said().splitlines() if line.startswith("train_gpt.py: rank ")]
    if (status, len(told)) not in {(0, 0), (2, 1)}:
        raise Lost("crash", f"{what}: status {status}, {told or sitting.last_line()}")


def under_torchrun(life: Life, chance: random.Random) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = real(life.folder, life.going_on(), launcher)
    victim = chance.randrange(2)
    try:
        while process.poll() is None and len(workers := children(process.pid)) < 2:
            time.sleep(0.05)
        time.sleep(chance.random() * TORCHRUN_SECONDS)
        if process.poll() is None:
            os.kill(workers[victim], signal.SIGKILL)
        process.wait(END_SECONDS + TORCHRUN_SECONDS)
    except ProcessLookupError:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise Lost("hang", f"torchrun, rank {victim}, SIGKILL") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"torchrun, rank {victim}, SIGKILL"


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    home = Path(sys.argv[1])
    preload()
    usual = Usual(home, lambda life: iter([pair(life)]))
    attempts(lambda seed: lead(home, seed, usual), int(sys.argv[2]))
