"""Which of the operations between the matrix products run fused (FUSED_GLUE), and which as the plain functions.

`auto` follows a table of what was measured to win in the compiled model, by compute capability: an operation that is
faster alone may lose there, because the compiler fuses the plain functions too. No GPU has been measured yet, so the
table is empty and `auto` is `off`.

`qkv_norm_rope` takes the place of `qk_norm_rope` and makes q, k, v and the gate one product. Others measured one
product at 0 ms (#1615) and 3 to 17% slower (#670), with copies behind it; without them it is a choice all the same.
"""

import torch

OPERATIONS = frozenset(  # qkv_norm_rope takes the place of qk_norm_rope
    ["embedding_smear_norm", "residual_rms_norm", "two_lane_rms_norm", "qk_norm_rope", "qkv_norm_rope", "xsa_gate"]
)
WINS: dict[tuple[int, int], frozenset[str]] = {}  # compute capability -> operations


def choose_fused_glue(setting: str, device: torch.device) -> frozenset[str]:
    """The operations that `Model.fused` is to name; `setting` is auto, on or off."""
    if setting == "on":
        return OPERATIONS
    if setting == "off" or device.type != "cuda":
        return frozenset()
    return WINS.get(torch.cuda.get_device_capability(device), frozenset())
