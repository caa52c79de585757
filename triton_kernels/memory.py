"""Masked loads and stores that compute in float32 whatever the dtype in memory."""

import triton
import triton.language as tl


@triton.jit
def load_wide(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_narrow(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)
