"""RMSNorm without weights, and the layerwise norm scale."""

import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · x / sqrt(mean(x²)) over the last dimension.

    The scale of layer l is 1 / sqrt(l + 1) with LN_SCALE (PR #315): deep layers read a smaller input, so that their
    weights' gradients and outputs do not outgrow those of the first.
    """
    x = F.rms_norm(x, (x.size(-1),))
    return x if scale == 1.0 else x * scale
