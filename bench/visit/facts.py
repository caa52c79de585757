"""Facts as lines of JSON in a folder, one file a kind of part. A line is there whole, or it is not there.

    {"part": "step loop fused", "fact": "step", "ms": 125.0, ..., "second": 201.4}

`second` is on the clock of the visit. Processes may add to one file: a line is one write at the file's end. What a
kill cuts off is a last line without its end, which `read` leaves out.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

FOLDER = "PGOLF_FACTS"  # environment: where facts go
START = "PGOLF_VISIT_START"  # time.time() of the visit's start
PART = "PGOLF_PART"  # name of the part that this process is of; its first word names the file


def add(fact: str, **values: Any) -> None:
    """Keep one fact: in the visit's folder, or printed where this process is of no visit."""
    part = os.environ.get(PART, "by hand")
    second = time.time() - float(os.environ[START]) if START in os.environ else 0.0
    line = json.dumps({"part": part, "fact": fact, **short(values), "second": round(second, 2)}, ensure_ascii=False)
    if FOLDER not in os.environ:
        print(line, flush=True)
        return
    append(Path(os.environ[FOLDER]) / f"{part.split()[0]}.jsonl", line)


def append(path: Path, line: str) -> None:
    """One write at the end of the file, past a torn line that a killed process may have left."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short(value: Any) -> Any:
    """Five significant digits: more than any of these figures holds."""
    if isinstance(value, dict):
        return {name: short(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(folder: Path) -> list[dict[str, Any]]:
    """All facts of a folder, in the order of their time. Lines that a kill cut off are left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue
            if isinstance(fact, dict) and "part" in fact and "fact" in fact:
                found.append(fact)
    return sorted(found, key=lambda fact: fact.get("second", 0.0))
