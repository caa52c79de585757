"""Tests and bench/ share one reader of compiled kernels: `import aot` finds bench/aot.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "bench"))
