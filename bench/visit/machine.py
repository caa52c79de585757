"""What the machine and its Python have: the device, the driver, versions, and the doctor's word.

    python -m bench.visit.machine [--build]

`--build` instead builds `pgolf._native` in place, where it is not there or is not of these sources.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.harness import device
from bench.visit import facts
from bench.visit.turns import turn

ROOT = Path(__file__).resolve().parents[2]
NVIDIA_SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def build() -> int:
    look = "from pgolf import _native; from pgolf.runtime import sources as s; import sys; "
    look += "sys.exit(_native.build_info()['sources'] != s.native_digest(s.root()))"
    if subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, timeout=120).returncode == 0:
        facts.add("native build", seconds=0.0, status=0)
        return 0
    begin = time.perf_counter()
    status = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode
    facts.add("native build", seconds=time.perf_counter() - begin, status=status)
    return status


def main() -> int:
    if sys.argv[1:] == ["--build"]:
        return build()
    begin = time.perf_counter()
    facts.add("device", **device.describe(), date=device.today(), processors=os.cpu_count())
    facts.add("import torch and look", seconds=time.perf_counter() - begin)
    if smi := shutil.which("nvidia-smi"):
        command = [smi, f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        facts.add("nvidia-smi", **{NVIDIA_SMI: done.stdout.strip() or done.stderr.strip()})
    import torch

    if torch.cuda.is_available():
        with turn():
            begin = time.perf_counter()
            torch.zeros(1, device="cuda").item()
            free, total = torch.cuda.mem_get_info()
            facts.add("first use of the device", seconds=time.perf_counter() - begin, free_bytes=free, bytes=total)
    done = subprocess.run(
        [sys.executable, "-m", "pgolf", "doctor", "--json"], capture_output=True, text=True, timeout=45
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        facts.add("doctor", status=done.returncode, error=(done.stderr.strip().splitlines() or [""])[-1][:300])
    else:
        facts.add("doctor", status=done.returncode, ok=found["ok"], problems=found["problems"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
