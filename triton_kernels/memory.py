"""Masked loads and stores that compute in float32 whatever the dtype in memory, and layouts that kernels take."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_wide(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_narrow(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


def by_token(x: Tensor) -> Tensor:
    """x (T, ...) with each token's values in one piece; the tokens may lie apart, as columns of a wider tensor do."""
    return x if x[:1].is_contiguous() else x.contiguous()
