"""Hostile input for as long as wanted: what the tests do for a second, with new seeds each time.

    python -m bench.studies.attack                  # a minute in all
    python -m bench.studies.attack --seconds 3600 --seed 7 --only artifacts

Each attack is a function (seconds, seed) -> Counter of outcomes, in `ATTACKS`, or None where it is left out for want of
a tool; seconds include its start. Needs Linux and g++, `native_readers` clang with libFuzzer, `full_disk` root or user
namespaces. Those of whole runs also tell on standard error in which phase of a run their attempts fell.

    refused             one line said what is wrong
    valid               as good as any other input, and used
    crash               a signal, a sanitizer's report, an error that is no refusal
    hang                no answer for `HANG_SECONDS`
    too much memory     more than `MEMORY_BYTES` above what the process needs to start
    lost run            what was on disk cannot be used: a torn file, a run that cannot go on

A line on standard error names the seed of everything that went wrong. Status 1 if anything did.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable

from bench.studies.attacks.artifacts import artifacts
from bench.studies.attacks.bad_input import bad_input
from bench.studies.attacks.coverage import native_readers
from bench.studies.attacks.full_disk import full_disk
from bench.studies.attacks.kills import kills
from bench.studies.attacks.native import coder_blobs, ngram_snapshots
from bench.studies.attacks.outcomes import FAILURES, OUTCOMES
from bench.studies.attacks.ranks import ranks

ATTACKS: list[Callable[[float, int], Counter[str] | None]] = [
    artifacts,
    coder_blobs,
    ngram_snapshots,
    native_readers,
    bad_input,
    kills,
    ranks,
    full_disk,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared evenly (60)")
    parser.add_argument("--seed", type=int, help="of the first attempt (a new one each time)")
    parser.add_argument("--only", choices=[attack.__name__ for attack in ATTACKS], help="one attack")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    chosen = [attack for attack in ATTACKS if arguments.only in (None, attack.__name__)]
    found = {attack.__name__: attack(arguments.seconds / len(chosen), seed) for attack in chosen}
    if arguments.json:
        print(json.dumps({"seed": seed, **found}, indent=2))
    else:
        print(f"{f'seed {seed}':20}{'attempts':>12}" + "".join(f"{outcome:>17}" for outcome in OUTCOMES))
        for name, counts in found.items():
            if counts is None:
                print(f"{name:20}{'left out':>12}")
                continue
            print(f"{name:20}{counts.total():>12,}" + "".join(f"{counts[outcome]:>17,}" for outcome in OUTCOMES))
    return int(any(counts[outcome] for counts in found.values() if counts for outcome in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
