"""Second moments of a matrix's inputs, added up batch by batch.

All of it is products by PyTorch, on every device, so there is no choice of a backend. Cost for T rows: on a CPU
T N (N + 128) FLOPs (the lower triangle, in blocks, then copied to the upper), on CUDA 2 T N² for one product, of
float16 and bfloat16 by the tensor cores; 2 T N bytes of bfloat16 read.
"""

import torch
from torch import Tensor

from pgolf.ops import checks
from pgolf.ops.gptq import products_in_full

BLOCK_COLUMNS = 128  # of the triangle, on a CPU
ROWS_AT_ONCE = 4096  # converted to float32 at a time, on a CPU


def accumulate_hessian(hessian: Tensor, x: Tensor) -> Tensor:
    """Add the second moments of `x` to `hessian`, in place: H += xᵀ x.

        H_ij += Σ_t x_ti x_tj    over the rows x_t of x

    float16 and bfloat16 inputs are multiplied exactly and added in float32; float64 is rounded to float32. What is
    added is symmetric to the bit, so a symmetric H stays symmetric. NaN and infinity are added as they come; `gptq`
    refuses them. Not differentiable.

    Args:
        hessian: float32 (N, N), symmetric; changed in place.
        x: (..., N), any floating dtype, on the device of hessian; all but the last dimension are rows.
    Returns:
        hessian.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape that does not fit, or tensors on two devices.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> hessian = torch.zeros(16, 16)
        >>> for _ in range(3):
        ...     _ = ops.accumulate_hessian(hessian, torch.randn(4, 8, 16))
        >>> hessian.shape, torch.equal(hessian, hessian.mT)
        (torch.Size([16, 16]), True)

    Source: the Hessian of GPTQ, Frantar et al., arXiv 2210.17323.
    """
    _check(hessian, x)
    _accumulate_hessian(hessian, x)
    return hessian


def accumulate_hessian_reference(hessian: Tensor, x: Tensor) -> Tensor:
    """The definition in plain PyTorch; arguments as for `accumulate_hessian`, but hessian may be float64 and stays."""
    flat = x.reshape(-1, x.shape[-1]).to(hessian.dtype)
    return hessian + flat.mT @ flat


@torch.library.custom_op("pgolf::accumulate_hessian", mutates_args=("hessian",))
def _accumulate_hessian(hessian: Tensor, x: Tensor) -> None:
    _check(hessian, x)  # again: this operation can be called without the public function
    if x.numel() == 0:
        return
    flat = x.detach().reshape(-1, x.shape[-1])
    if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
        product = torch.mm(flat.mT, flat, out_dtype=torch.float32)
        hessian += product.tril() + product.tril(-1).mT
        return
    with products_in_full(hessian):
        at_once = len(flat) if flat.is_cuda else ROWS_AT_ONCE
        for rows in flat.split(at_once):
            _add_lower(hessian, rows.to(torch.float32))
    _mirror(hessian)


@_accumulate_hessian.register_fake
def _(hessian: Tensor, x: Tensor) -> None:
    return None


def _blocks(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_COLUMNS, columns)) for start in range(0, columns, BLOCK_COLUMNS)]


def _add_lower(hessian: Tensor, rows: Tensor) -> None:
    """The lower triangle of hessian += rowsᵀ rows, in blocks of rows that end with the diagonal's block."""
    for start, stop in _blocks(len(hessian)):
        hessian[start:stop, :stop].addmm_(rows[:, start:stop].mT, rows[:, :stop])


def _mirror(hessian: Tensor) -> None:
    """Copy the lower triangle to the upper."""
    for start, stop in _blocks(len(hessian)):
        hessian[:start, start:stop] = hessian[start:stop, :start].mT
        block = hessian[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)


def _check(hessian: Tensor, x: Tensor) -> None:
    checks.tensor("hessian", hessian, (torch.float32,))
    checks.tensor("x", x, checks.FLOATS)
    if x.ndim < 1:
        raise ValueError("x: a number is not accepted; expected (..., N)")
    checks.shape("hessian", hessian, (x.shape[-1], x.shape[-1]), "N, N for x of (..., N)")
    checks.same_device("hessian", hessian, x=x)
