"""The trellis decoder: from indices to weights.

Traffic: 5 bytes a weight. Exact on every backend; native is for the CPU.
"""

import torch
from torch import Tensor

from pgolf.ops import backends, checks

# next state for even, odd index; and the quantiser of each state
NEXT = {
    4: ((0, 2), (2, 0), (1, 3), (3, 1)),
    8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
}
QUANTIZER = {4: (0, 0, 1, 1), 8: (0, 1, 0, 1, 0, 1, 0, 1)}
backends.register("trellis_dequantize", native=("cpu",))


def trellis_dequantize(indices: Tensor, scale: Tensor, order: Tensor, states: int) -> Tensor:
    """The weights that the indices of `trellis_quantize` mean, in float32.

        w[r, j] = (2 k - quantiser · sgn k) · scale[r]     k = indices[r, j]; one rounding of one product

    The quantiser, 0 or 1, follows from a machine whose state the parities of a row's earlier indices determine; its
    tables are told in `trellis_quantize`. The machine takes the columns by class and, in a class, as they come. Not
    differentiable.

    Args:
        indices: int8 (M, N) or (B, M, N).
        scale: floating (M,) or (B, M).
        order: int8 (N,) or (B, N), the columns' classes, 0..3.
        states: 4 or 8, as quantised.
    Returns:
        float32 of the shape of indices.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape, device, class or number of states that does not fit.
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> indices, order = torch.tensor([[1, 2, -3, 0]], dtype=torch.int8), torch.zeros(4, dtype=torch.int8)
        >>> ops.trellis_dequantize(indices, torch.ones(1), order, states=8).shape
        torch.Size([1, 4])

    Source: dependent quantisation, as in video coding (ITU-T H.266).
    """
    _check_indices(indices, scale, order, states)
    return _trellis_dequantize(indices, scale, order, states)


def trellis_dequantize_reference(indices: Tensor, scale: Tensor, order: Tensor, states: int) -> Tensor:
    """The definition in plain PyTorch; arguments as for `trellis_dequantize`."""
    wide = indices.to(torch.int16)
    levels = 2 * wide - quantizers_of(indices, order, states) * wide.sign()
    return levels.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)


def quantizers_of(indices: Tensor, order: Tensor, states: int) -> Tensor:
    """Quantiser 0 or 1 of every index, int8 like `indices`: what a coder of indices knows beside them."""
    columns = order.long().argsort(dim=-1, stable=True).unsqueeze(-2).expand_as(indices)
    odd = indices.gather(-1, columns).long() & 1
    following = torch.tensor(NEXT[states], device=indices.device)
    quantizer = torch.tensor(QUANTIZER[states], device=indices.device, dtype=torch.int8)
    state = odd.new_zeros(odd.shape[:-1])
    found = torch.empty_like(indices)
    for j in range(indices.shape[-1]):
        found[..., j] = quantizer[state]
        state = following[state, odd[..., j]]
    return torch.empty_like(indices).scatter_(-1, columns, found)


@torch.library.custom_op("pgolf::trellis_dequantize", mutates_args=())
def _trellis_dequantize(indices: Tensor, scale: Tensor, order: Tensor, states: int) -> Tensor:
    _check_indices(indices, scale, order, states)  # again: this operation can be called without the public function
    _check_classes(order)
    if backends.choose("trellis_dequantize", indices.device.type) == "reference":
        return trellis_dequantize_reference(indices, scale, order, states)
    out = torch.empty(indices.shape, dtype=torch.float32)
    tensors = (indices.contiguous(), scale.float().contiguous(), order.contiguous(), out)
    matrices = indices.shape[0] if indices.ndim == 3 else 1
    sizes = (matrices, *indices.shape[-2:], states)
    backends.native().trellis_dequantize(*(one.data_ptr() for one in tensors), *sizes, threads=torch.get_num_threads())
    return out


@_trellis_dequantize.register_fake
def _(indices: Tensor, scale: Tensor, order: Tensor, states: int) -> Tensor:
    return torch.empty_like(indices, dtype=torch.float32, memory_format=torch.contiguous_format)


def check_states(states: int) -> None:
    """`states` is 4 or 8."""
    if isinstance(states, bool) or not isinstance(states, int):
        raise TypeError(f"states: expected an int, got {type(states).__name__}")
    if states not in NEXT:
        raise ValueError(f"states: {states} is not accepted; accepted are 4 and 8")


def _check_indices(indices: Tensor, scale: Tensor, order: Tensor, states: int) -> None:
    checks.tensor("indices", indices, (torch.int8,))
    checks.tensor("scale", scale, checks.FLOATS)
    checks.tensor("order", order, (torch.int8,))
    shape = tuple(indices.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"indices: shape {shape} is not accepted; expected (M, N) or (B, M, N)")
    checks.shape("scale", scale, shape[:-1], "one scale a row")
    checks.shape("order", order, (*shape[:-2], shape[-1]), "one class a column")
    checks.same_device("indices", indices, scale=scale, order=order)
    check_states(states)


def _check_classes(order: Tensor) -> None:
    if order.numel():
        least, most = (each.item() for each in torch.aminmax(order))
        if least < 0 or most > 3:
            raise ValueError(f"order: {least if least < 0 else most} is not accepted; accepted are 0 to 3")
