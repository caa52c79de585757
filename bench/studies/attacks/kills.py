"""Signals to a run in each of its phases. It must go on, or begin again, and give what it gives undisturbed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.studies.attacks.lives import Life, Lost, Usual, attempts
from bench.studies.attacks.outcomes import ROOT, watch
from bench.studies.attacks.sittings import Sitting, made_up_documents, preload, real

# A life's signals come in this order. "imports" is Python's own start, in a process that is not forked; "files" is the
# moment before one of a sitting's operations on files, each in turn.
PHASES = (
    "tokenize", "imports", "files", "start", "data", "model", "warm-up", "training", "checkpoint", "calibration",
    "quantization", "artifact", "scoring", "summary", "report", "end",
)  # fmt: skip
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "fcntl.flock"}
OPERATIONS_OF_A_SITTING = 100  # about
KILLS = 6  # of a run, before it may end
STRIDE = 5  # between the phases of one life; with KILLS it makes all phases come equally often
SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 3, signal.SIGINT: 3}
STATUSES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM},
    signal.SIGINT: {128 + signal.SIGINT},
}
IMPORT_SECONDS = 3.0
END_SECONDS = 25.0  # a sitting that was signalled has as long


def kills(seconds: float, seed: int) -> Counter[str]:
    """A seed is a life of `KILLS` signals."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "bench.studies.attacks.kills", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return watch("kills", lambda at: [*start, str(at)], seconds, seed, environment)


def write_text(folder: Path) -> None:
    folder.mkdir()
    for number, text in enumerate(made_up_documents()):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def tokenize(life: Life, **options) -> Sitting:
    arguments = ["data", "tokenize", str(life.folder.parent / "text"), "--out", "mine", "--vocab-size", "400"]
    return Sitting(life.folder, "pgolf", arguments, {}, **options)


def sittings(life: Life) -> Iterator[list[Sitting]]:
    """Shards of one's own, and a run on the demo's, which are made on first use."""
    if not (life.folder / "mine").exists():
        yield [tokenize(life)]
    yield [life.train()]


def lead(life: Life, seed: int, usual: Usual) -> Iterator[str]:
    """The phases in which the signals of one life fell."""
    chance = random.Random(seed)
    fell = []
    for place in sorted((seed * KILLS + number) * STRIDE % len(PHASES) for number in range(KILLS)):
        phase = PHASES[place]
        (number,) = chance.choices([*SIGNALS], SIGNALS.values())
        what = f"{phase}, {signal.Signals(number).name}"
        try:
            fell.append(strike(life, phase, number, chance, usual))
        except TimeoutError:
            raise Lost("hang", f"{what}: no end in {END_SECONDS:g} s") from None
        except AssertionError as error:
            raise Lost("crash", f"{what}: {error}") from None
        problem = life.problem()
        if problem:
            raise Lost("lost run", f"{what}: {problem}")
        yield ""
    life.end_well(usual, ", ".join(fell))
    yield from fell


def strike(life: Life, phase: str, number: int, chance: random.Random, usual: Usual) -> str:
    """Where in a sitting the signal fell."""
    if phase == "imports":
        return strike_imports(life, number, chance)
    if phase == "files":
        sitting = life.train(hook=Countdown(chance.randint(1, OPERATIONS_OF_A_SITTING), number))
    else:
        if phase == "data":  # made anew
            shutil.rmtree(life.folder / "data", ignore_errors=True)
        sitting = tokenize(life) if phase == "tokenize" else life.train()
        if phase == "tokenize" and (life.folder / "mine").exists():
            sitting.end()
            return "not reached"
        if sitting.until(phase, chance.randint(1, 4) if phase == "checkpoint" else 1):
            time.sleep(chance.random() * usual.seconds[phase])
            sitting.send(number)
    status = sitting.end(END_SECONDS)
    assert not sitting.trace(), sitting.trace()
    through = {0, -number} if sitting.phase == "end" else {0}  # 0: the last files were written
    assert status in STATUSES[number] | through, f"status {status}: {sitting.last_line()}"
    return phase if phase == "files" else sitting.phase


class Countdown:
    """A hook that sends signal `number` before a sitting's operation on files of number `count`, 1 and on."""

    def __init__(self, count: int, number: int):
        self.left, self.number = count, number

    def __call__(self, phase: str) -> None:
        if phase == "start":
            sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in OPERATIONS and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), self.number)


def strike_imports(life: Life, number: int, chance: random.Random) -> str:
    process = real(life.folder, life.going_on())
    time.sleep(chance.random() * IMPORT_SECONDS)
    process.send_signal(number)
    try:
        status = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise TimeoutError from None
    said = (life.folder.parent / f"{life.folder.name}.output").read_text(encoding="utf-8", errors="replace")
    if "Traceback" in said and ("pgolf" in said or "train_gpt" in said):
        raise AssertionError(said.strip().splitlines()[-1])
    # Before pgolf's own first line Python dies of it, or tells where it was.
    assert "Traceback" in said or status in STATUSES[number] | {0, -number}, f"status {status}"
    return "imports"


if __name__ == "__main__":
    home = Path(sys.argv[1])
    preload()
    write_text(home / "text")
    usual = Usual(home, sittings)
    attempts(lambda seed: lead(Life(home / str(seed)), seed, usual), int(sys.argv[2]))
