"""What the tests of the operations between matrix products share: cases with inputs and a formula, and checks of them.

The files of the operations have a list `CASES`, and `RECORD` at the record's widths, for a GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from numerics import assert_no_worse
from torch import Tensor


class Case(NamedTuple):
    operation: str
    make: Callable[
        [torch.dtype, str, int], tuple[Tensor, ...]
    ]  # dtype, device, tokens -> inputs, leaves need gradients
    ours: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]  # written out from the docstring
    by_row: bool = False  # its tokens are those of one of two rows
    order: float = 0.05  # more where a gradient sums over all tokens and channels: numerics.assert_no_worse


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def scalars(count: int, dtype: torch.dtype, device: str) -> Tensor:
    """As a model has them: not so near zero that what they multiply vanishes and its norm has no direction."""
    return (0.6 + 0.1 * torch.randn(count, device=device)).to(dtype).requires_grad_()


def rms(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def leaves_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor.requires_grad)


def exactly(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same numbers in float64."""
    return tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors)


def run(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], upstream: list[Tensor]):
    """Results and gradients of all leaves."""
    outs = function(*inputs)
    grads = torch.autograd.grad(outs, leaves_of(inputs), [g.to(o.dtype) for g, o in zip(upstream, outs, strict=True)])
    return [out.detach() for out in outs] + list(grads)


def upstream_of(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.randn_like(out) for out in case.formula(*(t.detach() for t in inputs))]


def check_against_float64(case: Case, dtype: torch.dtype, tokens: int = 200) -> None:
    """Results and gradients, beside those of the formula in the same dtype."""
    inputs = case.make(dtype, "cpu", tokens)
    upstream = upstream_of(case, inputs)
    mine, plain = run(case.ours, inputs, upstream), run(case.formula, inputs, upstream)
    for found, plainly, true in zip(mine, plain, run(case.formula, exactly(inputs), upstream), strict=True):
        assert found.dtype == dtype
        assert_no_worse(found, plainly, true, case.order)


def check_one_graph(case: Case) -> None:
    inputs = case.make(torch.float32, "cpu", 6)
    upstream = upstream_of(case, inputs)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs, upstream), run(case.ours, inputs, upstream))


def check_zero_strides_and_frozen_inputs(case: Case) -> None:
    """A gradient of zero strides, and of one input alone."""
    inputs = case.make(torch.float32, "cpu", 7)
    outs = case.ours(*inputs)
    expected = torch.autograd.grad(outs, inputs[0], [torch.ones_like(out) for out in outs])
    frozen = (inputs[0], *(t.detach() for t in inputs[1:]))
    found = torch.autograd.grad(sum(out.sum() for out in case.ours(*frozen)), inputs[0])
    torch.testing.assert_close(found, expected)


def check_no_tokens(case: Case) -> None:
    inputs = case.make(torch.float32, "cpu", 7)
    assert all(out.shape[0] == 0 for out in case.ours(*(t[:0] if t.shape[:1] == (7,) else t for t in inputs)))


def kept_for_backward(case: Case, tokens: int = 50) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
    """(inputs, results, what is saved between the passes)."""
    inputs, saved = case.make(torch.float32, "cpu", tokens), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outs = case.ours(*inputs)
    return inputs, outs, saved


def check_kept_for_backward(case: Case, count: int) -> None:
    """`count` tensors of tokens, no smaller than the second input."""
    inputs, _, saved = kept_for_backward(case)
    assert sum(tensor.numel() >= inputs[1].numel() for tensor in saved) == count
