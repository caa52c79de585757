"""What the native code reads, by programs of csrc/ alone under AddressSanitizer and UBSan."""

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from attacks.outcomes import HANG_SECONDS, note


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
