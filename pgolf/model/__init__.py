"""The model: a decoder-only transformer whose matrices live in banks, one 3-D parameter a role.

`model.py` is the one forward pass that training, calibration and scoring all call. Each technique is a small pure
function in a file of its name or, where it has kernels, the definition of an operation in pgolf/ops; `ModelConfig` says
which are on. A technique that is off has no parameters
and adds no operation.
"""

from pgolf.model.config import LOOKED_UP, ModelConfig, role_of
from pgolf.model.glue import choose_fused_glue
from pgolf.model.model import Model, Observer
from pgolf.model.norm import norm

__all__ = ["LOOKED_UP", "Model", "ModelConfig", "Observer", "choose_fused_glue", "norm", "role_of"]
