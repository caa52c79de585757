"""The model: a decoder-only transformer whose matrices live in banks, one 3-D parameter a role.

`model.py` is the one forward pass that training, calibration and scoring all call. Each technique is a small pure
function in a file of its name or, where it has kernels, the definition of an operation in pgolf/ops; `ModelConfig` says
which are on. A technique that is off has no parameters
and adds no operation.
"""

from pgolf.model.config import LOOKED_UP, ModelConfig, role_of
from pgolf.model.execution import Execution, choose_execution
from pgolf.model.layer import Observer
from pgolf.model.model import Model
from pgolf.ops.residual_rms_norm import norm

__all__ = [
    "LOOKED_UP",
    "Execution",
    "Model",
    "ModelConfig",
    "Observer",
    "choose_execution",
    "norm",
    "role_of",
]
