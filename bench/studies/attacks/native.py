"""What the native code reads, by programs of csrc/ alone under AddressSanitizer and UBSan."""

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.studies.attacks.outcomes import HANG_SECONDS, note


def coder_blobs(seconds: float, seed: int) -> Counter[str]:
    """Decoded by the coder's own code under the sanitizers."""
    from fuzz_seeds import write_seeds

    with tempfile.TemporaryDirectory() as folder:
        paths = write_seeds("coder", Path(folder))
        return drive("fuzz/coder", lambda at: [str(at), "200", *map(str, paths)], seconds, seed)


def ngram_snapshots(seconds: float, seed: int) -> Counter[str]:
    """Restored, learned from and saved again under the sanitizers."""
    return drive("ngram_driver", lambda at: [str(at), "8", "250"], seconds, seed)


def drive(driver: str, arguments: Callable[[int], list[str]], seconds: float, seed: int) -> Counter[str]:
    """Runs of a driver of the tests, which prints how many of its attempts were refused and how many valid."""
    from native_drivers import SANITIZED, build

    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        problem = build(program, driver, *SANITIZED, "-O1", "-w")
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
                    refused, valid = map(int, done.stdout.split()[:2])
                    found.update(refused=refused, valid=valid)
            except subprocess.TimeoutExpired:
                note(driver, seed, "hang", f"{10 * HANG_SECONDS:g} s for one run", found)
            seed += 1
    return found
