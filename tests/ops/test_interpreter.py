"""Run the `interpreted_*.py` files beside this one with Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so they need a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgolf.runtime.tried import interpreter_fails, release

WITH_DESCRIPTORS = ("interpreted_leaky_relu2_mlp", "interpreted_newton_schulz")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_interpreted(path):
    triton = pytest.importorskip("triton")
    if interpreter_fails(triton.__version__, np.__version__):
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails with numpy {np.__version__}; it needs < 2.4")
    if release(triton.__version__) < (3, 6) and path.stem in WITH_DESCRIPTORS:
        pytest.skip(f"the interpreter of Triton {triton.__version__} refuses descriptors whose strides are good")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
