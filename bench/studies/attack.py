"""Hostile input for as long as wanted: what the tests do for a second, with new seeds each time.

    python bench/studies/attack.py                  # a minute in all
    python bench/studies/attack.py --seconds 3600 --seed 7 --only artifacts

Each attack is a function (seconds, seed) -> Counter of outcomes, in `ATTACKS`; seconds include its start. Needs Linux
and g++.

    refused             one line said what is wrong
    valid               as good as any other input, and used
    crash               a signal, a sanitizer's report, an error that is no refusal
    hang                no answer for `HANG_SECONDS`
    too much memory     more than `MEMORY_BYTES` above what the process needs to start

A line on standard error names the seed of everything that went wrong. Status 1 if anything did.
"""

import argparse
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the machinery is that of the tests

OUTCOMES = ("refused", "valid", "crash", "hang", "too much memory")
FAILURES = OUTCOMES[2:]
HANG_SECONDS = 60.0
MEMORY_BYTES = 1 << 30
SIGNED_SHARE = 0.75  # of the artifacts, whose checksums are put right

Attack = Callable[[float, int], Counter[str]]


def artifacts(seconds: float, seed: int) -> Counter[str]:
    """Read and built by a process of bounded memory, which is started anew where it dies."""
    with tempfile.TemporaryDirectory() as folder:
        write_good_artifact(Path(folder) / "good.pgolf")
        start = [sys.executable, __file__, "--read", folder, "--seed"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        return watch(lambda at: [*start, str(at)], seconds, seed, environment)


def watch(
    command: Callable[[int], list[str]], seconds: float, seed: int, environment: dict[str, str] | None = None
) -> Counter[str]:
    """Outcomes of a process that prints a seed before each attempt, and its outcome and a word on it after."""
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began, outcome = seed, ""
        with subprocess.Popen(
            command(seed), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as child:
            try:
                for line in lines_of(child, end):
                    number, outcome, what = [*line.split(" ", 2), "", ""][:3]
                    began, outcome = int(number), outcome.replace("_", " ")
                    if outcome:
                        note("artifacts", began, outcome, what, found)
                if time.monotonic() >= end:
                    child.kill()
                    return found
                if not outcome:  # ended in the middle of an attempt, or before the first
                    note("artifacts", began, "crash", f"status {child.wait()}", found)
            except TimeoutError:
                child.kill()
                note("artifacts", began, "hang", f"{HANG_SECONDS:g} s", found)
        seed = began + 1
    return found


def lines_of(child: subprocess.Popen[bytes], end: float) -> Iterator[str]:
    """What a process prints, until it ends or the time is over; a TimeoutError where it says nothing for too long."""
    assert child.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if not selector.select(HANG_SECONDS):
                raise TimeoutError
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)


def note(attack: str, seed: int, outcome: str, what: str, found: Counter[str]) -> None:
    found[outcome] += 1
    if outcome in FAILURES:
        print(f"{attack}, seed {seed}: {outcome}: {what}", file=sys.stderr)


def write_good_artifact(path: Path) -> None:
    """A small model with everything in it that a file can hold."""
    import torch

    from pgolf.artifact import write_artifact
    from pgolf.model import Model, ModelConfig
    from pgolf.quantize import quantize
    from pgolf.settings import load_settings

    environ = {"PRESET": "demo", "VOCAB_SIZE": "60", "MODEL_DIM": "32", "NUM_LAYERS": "2", "LQER_RANK": "2"}
    settings = load_settings({**environ, "BIGRAM_VOCAB_SIZE": "50", "BIGRAM_DIM": "8", "VE_LAYERS": "1", "VE_DIM": "8"})
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(0))
    moments = {
        name: torch.eye(bank.shape[-1]).repeat(len(bank) if bank.ndim == 3 else 1, 1, 1)
        for name, bank in model.named_parameters()
    }
    scoring = {"scoring": settings.scoring, "looping": False, "tokenizer_sha256": "0" * 64}
    write_artifact(path, quantize(model, moments, settings), {"model": model.config.as_dict(), **scoring})


def read_mutants(folder: Path, seed: int) -> None:
    """The process that `artifacts` watches."""
    good, trial = folder / "good.pgolf", folder / "trial.pgolf"
    assert read_and_build(good) == ("valid", "")  # what is imported and started for it is not counted below
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        print(seed, flush=True)
        trial.write_bytes(mutant(good.read_bytes(), seed))
        outcome, what = read_and_build(trial)
        print(seed, outcome.replace(" ", "_"), what, flush=True)
        seed += 1


def mutant(whole: bytes, seed: int) -> bytes:
    from test_artifact_fuzz import corrupt, mutate_and_sign

    chance = random.Random(seed)
    return (mutate_and_sign if chance.random() < SIGNED_SHARE else corrupt)(whole, chance)


def read_and_build(path: Path) -> tuple[str, str]:
    """The outcome, and a word on it."""
    import torch

    from pgolf.artifact import read_artifact
    from pgolf.errors import PgolfError
    from pgolf.quantize import model_from_artifact

    torch.set_num_threads(1)
    try:
        artifact = read_artifact(path)
        if "model" in artifact.metadata:
            model_from_artifact(artifact, torch.float32, torch.device("cpu"))
    except PgolfError as error:
        return ("crash", "several lines") if "\n" in str(error) else ("refused", "")
    except MemoryError:
        return "too much memory", ""
    except Exception as error:
        what = repr(error).replace("\n", " ")
        return "too much memory" if "not enough memory" in what else "crash", what  # as torch says it
    return "valid", ""


def coder_blobs(seconds: float, seed: int) -> Counter[str]:
    """Decoded by the coder's own code under the sanitizers."""
    from test_coder import sample_blobs

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name.replace(" ", "_") for name in sample_blobs()]
        for path, blob in zip(paths, sample_blobs().values(), strict=True):
            path.write_bytes(blob)
        return drive(
            "coder_driver", lambda at: ["fuzz", str(at), "500", *map(str, paths)], 500 * len(paths), seconds, seed
        )


def ngram_snapshots(seconds: float, seed: int) -> Counter[str]:
    """Restored, learned from and saved again under the sanitizers."""
    return drive("ngram_driver", lambda at: [str(at), "8", "250"], 8 * 250, seconds, seed)


def drive(driver: str, arguments: Callable[[int], list[str]], attempts: int, seconds: float, seed: int) -> Counter[str]:
    """Runs of a driver of the tests, which prints how many of its attempts were refused."""
    from native_drivers import SANITIZED, build

    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        problem = build(program, driver, *SANITIZED, "-O1")
        if problem:
            raise SystemExit(f"{driver}: {problem.strip()[-500:]}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                done = subprocess.run(
                    [program, *arguments(seed)], capture_output=True, text=True, timeout=10 * HANG_SECONDS
                )
                if done.returncode:
                    said = (done.stderr or done.stdout).strip().splitlines()
                    note(driver, seed, "crash", said[0] if said else f"status {done.returncode}", found)
                else:
                    refused = int(done.stdout.split()[0])
                    found.update(refused=refused, valid=attempts - refused)
            except subprocess.TimeoutExpired:
                note(driver, seed, "hang", f"{10 * HANG_SECONDS:g} s for {attempts} attempts", found)
            seed += 1
    return found


ATTACKS: list[Attack] = [artifacts, coder_blobs, ngram_snapshots]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared evenly (60)")
    parser.add_argument("--seed", type=int, help="of the first attempt (a new one each time)")
    parser.add_argument("--only", choices=[attack.__name__ for attack in ATTACKS], help="one attack")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    if arguments.read:
        read_mutants(arguments.read, seed)
    chosen = [attack for attack in ATTACKS if arguments.only in (None, attack.__name__)]
    found = {attack.__name__: attack(arguments.seconds / len(chosen), seed) for attack in chosen}
    if arguments.json:
        print(json.dumps({"seed": seed, **found}, indent=2))
    else:
        print(f"{f'seed {seed}':20}{'attempts':>12}" + "".join(f"{outcome:>17}" for outcome in OUTCOMES))
        for name, counts in found.items():
            print(f"{name:20}{counts.total():>12,}" + "".join(f"{counts[outcome]:>17,}" for outcome in OUTCOMES))
    return int(any(counts[outcome] for counts in found.values() for outcome in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
