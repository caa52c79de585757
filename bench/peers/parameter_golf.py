"""The challenge's own baseline script: its Newton-Schulz iteration, one matrix at a time in bfloat16."""

from pathlib import Path
from types import SimpleNamespace

import torch

from peers import take_functions

REPOSITORY = "openai/parameter-golf"


def load(checkout: Path) -> SimpleNamespace:
    names = ["zeropower_via_newtonschulz5"]  # (matrix (M, N), steps) -> (M, N) bfloat16
    return take_functions(checkout / "train_gpt.py", names, {"torch": torch, "Tensor": torch.Tensor})
