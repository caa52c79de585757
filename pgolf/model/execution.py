"""How a model is computed, apart from what it computes: dtype, attention backend, fused operations.

Fused operations take the place of the plain functions between the matrix products (FUSED_GLUE). `auto` follows a table
of what was measured to win in the compiled model, by compute capability: an operation that is faster alone may lose
there, because the compiler fuses the plain functions too. No GPU has been measured yet, so the table is empty and
`auto` is `off`.

`qkv_norm_rope` takes the place of `qk_norm_rope` and makes q, k, v and the gate one product. Others measured one
product at 0 ms (#1615) and 3 to 17% slower (#670), with copies behind it; without them it is a choice all the same.
"""

from dataclasses import dataclass

import torch

from pgolf.model.attention import choose_attention

FUSABLE = frozenset(
    ["embedding_smear_norm", "residual_rms_norm", "two_lane_rms_norm", "qk_norm_rope", "qkv_norm_rope", "xsa_gate"]
)
WINS: dict[tuple[int, int], frozenset[str]] = {}  # compute capability -> operations


@dataclass(frozen=True)
class Execution:
    """Given to `Model` when it is built; `Model.execute` changes it."""

    dtype: torch.dtype = torch.float32  # of the forward pass; parameters are float32
    attention: str = "auto"  # a backend of pgolf.model.attention
    fused: frozenset[str] = frozenset()  # some of FUSABLE

    def __post_init__(self) -> None:
        if unknown := self.fused - FUSABLE:
            wrong, known = (", ".join(sorted(names)) for names in (unknown, FUSABLE))
            raise ValueError(f"fused: {wrong} is not accepted; expected any of {known}")


def choose_execution(
    device: torch.device,
    dtype: torch.dtype,
    longest: int,  # tokens of a row or document, at most
    attention: str = "auto",  # the settings ATTENTION
    fused_glue: str = "auto",  # and FUSED_GLUE
) -> Execution:
    """What the settings ask for, or with "auto" the best that the device has.

    `UserError` when an attention backend is wanted by name that cannot be used here.
    """
    return Execution(dtype, choose_attention(attention, device, dtype, longest), _choose_fused(fused_glue, device))


def _choose_fused(setting: str, device: torch.device) -> frozenset[str]:
    if setting == "on":
        return FUSABLE
    if setting == "off" or device.type != "cuda":
        return frozenset()
    return WINS.get(torch.cuda.get_device_capability(device), frozenset())
