"""Runs on a disk that fills up in each phase: a small tmpfs in a mount namespace of its own, so that nothing is left.

Needs `unshare`, and root or user namespaces; where they are not allowed a line says so and it is left out.
"""

import contextlib
import errno
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.studies.attacks.kills import sittings, tokenize, write_text
from bench.studies.attacks.lives import FILES, Life, Lost, Usual, attempts
from bench.studies.attacks.outcomes import ROOT, watch
from bench.studies.attacks.sittings import Sitting, in_a_child, preload

# "import" and "output": `pgolf import-checkpoint`, and what `pgolf eval` and others print into a file.
PHASES = (
    "start", "data", "model", "warm-up", "training", "checkpoint", "calibration", "quantization", "artifact", "scoring",
    "summary", "report", "tokenize", "import", "output",
)  # fmt: skip
DISK = "size=24m,nr_inodes=400"
# Bytes that are left, at most, as a power of two: as many as the files of what is left to do; and a third as many
# files.
MOST_LEFT = {"calibration": 15, "quantization": 15, "artifact": 15, "scoring": 15, "summary": 13, "report": 17}
MOST_LEFT |= {"tokenize": 17, "data": 16, "import": 17, "output": 12}
CHECKPOINTS = 21  # of the other phases
END_SECONDS = 25.0
FULL = os.strerror(errno.ENOSPC)


def full_disk(seconds: float, seed: int) -> Counter[str] | None:
    """A seed is one disk."""
    own = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    try:
        trial = subprocess.run([*own, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
        problem = trial.stderr.strip() if trial.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        print(f"full_disk: left out, for no disk can be mounted here ({problem})", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        start = [*own, sys.executable, "-m", "bench.studies.attacks.full_disk", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return watch("full_disk", lambda at: [*start, str(at)], seconds, seed, environment)


def fill(folder: Path, left: int, files: bool) -> None:
    """Leave `left` bytes of the disk, or files."""
    (folder / "ballast").mkdir()
    if files:
        while os.statvfs(folder).f_favail > left:
            (folder / "ballast" / str(os.statvfs(folder).f_favail)).touch()
        return
    with contextlib.suppress(OSError), open(folder / "ballast" / "0", "wb", buffering=0) as file:
        found = os.statvfs(folder)  # before which, and after, another thread of the run may write
        file.write(bytes(max(found.f_bavail * found.f_frsize - left, 0)))


def lead(home: Path, seed: int, usual: Usual) -> Iterator[str]:
    folder = home / str(seed)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "none", folder], check=True)
    try:
        yield attempt(Life(folder), PHASES[seed % len(PHASES)], random.Random(seed), usual)
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def attempt(life: Life, phase: str, chance: random.Random, usual: Usual) -> str:
    """Where the disk was full, and whether that was felt."""
    files, exponent = chance.random() < 0.2, chance.random() * MOST_LEFT.get(phase, CHECKPOINTS)
    left = int(exponent / 3) if files else int(2**exponent)
    times = chance.randint(1, 4) if phase == "checkpoint" else 1
    what = f"{phase}, {left} {'files' if files else 'bytes'} left"

    def hook(begun: str) -> None:
        nonlocal times
        times -= begun == where
        if not times:
            times = -1
            fill(life.folder, left, files)

    where = phase if phase not in ("import", "output") else "start"
    stdout = life.folder / "stdout" if phase == "output" or chance.random() < 0.5 else None
    sitting = start(life, phase, chance, hook=hook, stdout=stdout)
    try:
        status = sitting.end(END_SECONDS)
    except TimeoutError:
        raise Lost("hang", what) from None
    if sitting.trace() or status not in (0, 2):
        raise Lost("crash", f"{what}: status {status}: {sitting.last_line()}")
    check_line(life, sitting, what)
    problem = life.problem() or next((f"{path} was left" for path in life.folder.glob("**/.*.tmp")), "")
    if problem:
        raise Lost("lost run", f"{what}: {problem}")
    for ballast in (life.folder / "ballast").glob("*"):
        ballast.unlink()
    life.every_metric = False
    go_on(life, phase, status, usual, what)
    return f"{phase} ({'refused' if status else 'room enough'})"


def start(life: Life, phase: str, chance: random.Random, **options) -> Sitting:
    home = life.folder.parent
    tokenizer = ["--tokenizer-path", str(home / "data/tokenizers/demo_1024_bpe.model")]
    if phase == "tokenize":
        return tokenize(life, **options)
    if phase == "import":
        from test_import_checkpoint import NARROW

        arguments = ["import-checkpoint", str(home / "final_model.pt"), "--preset", "record", *tokenizer]
        return Sitting(life.folder, "pgolf", arguments, NARROW, **options)
    if phase == "output":
        model = str(home / "model.pgolf")
        evaluation = ["eval", model, "--data-path", str(home / "data/datasets/demo_sp1024"), *tokenizer]
        arguments = chance.choice([evaluation, ["artifact", "show", model, "--json"], ["settings"], ["--help"]])
        return Sitting(life.folder, "pgolf", arguments, {}, **options)
    return life.train(**options)


def check_line(life: Life, sitting: Sitting, what: str) -> None:
    """A refusal is one line, which names the file and what is safe."""
    said = [line for line in sitting.said().splitlines() if line.startswith(("train_gpt.py: ", "pgolf: "))]
    last = [line for line in said if not line.startswith("train_gpt.py: warning: ")]
    if len(last) != bool(sitting.status):
        raise Lost("crash", f"{what}: status {sitting.status}, {last}")
    for line in last:
        safe = line.partition("safe in ")[2].partition(": ")[2]
        if FULL not in line or (any((life.run / name).exists() for name in FILES) and not safe):
            raise Lost("crash", f"{what}: {line}")
        for name in safe.split(", ") if safe else []:
            if name != "nothing" and not (life.run / name).exists():
                raise Lost("lost run", f"{what}: {name} is not there: {line}")


def go_on(life: Life, phase: str, status: int, usual: Usual, what: str) -> None:
    """With room the run goes on, or begins again; one that has its artifact and no checkpoint is through."""
    if phase in ("import", "output"):
        return
    checkpoints = any((life.run / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    if (life.run / "model.pgolf").exists() and not checkpoints:
        if (life.run / "model.pgolf").read_bytes() != usual.artifact:
            raise Lost("lost run", f"{what}: another artifact than that of an undisturbed run")
        return
    life.end_well(usual, what)


def prepare(home: Path, artifact: bytes) -> str:
    """What the commands are given."""
    import torch
    from test_import_checkpoint import config_of, random_model, saved_with_banks

    from pgolf.data.prepare import prepare_demo

    prepare_demo(home / "data")
    torch.save(saved_with_banks(random_model(config_of("record"))), home / "final_model.pt")
    (home / "model.pgolf").write_bytes(artifact)
    return ""


if __name__ == "__main__":
    home = Path(sys.argv[1])
    preload()
    write_text(home / "text")
    usual = Usual(home, sittings)
    problem = in_a_child(lambda: prepare(home, usual.artifact))
    assert not problem, problem
    attempts(lambda seed: lead(home, seed, usual), int(sys.argv[2]))
