"""What the machine and its Python have: the device, the driver, versions, and the doctor's word."""

import json
import os
import shutil
import subprocess
import sys
import time

from bench.harness import device
from bench.visit import facts
from bench.visit.turns import turn

NVIDIA_SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def main() -> int:
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
