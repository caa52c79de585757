"""What this computer has: cores for this process, and a CUDA compiler.

setup.py runs this file before anything is installed, so it needs the standard library alone.
"""

import os
import shutil

NVCC_PLACES = "CUDACXX where set, else PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_nvcc() -> str | None:
    """The path of the first nvcc of NVCC_PLACES."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    chosen = os.environ.get("CUDACXX")
    names = [chosen] if chosen else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in names if (found := shutil.which(name))), None)
