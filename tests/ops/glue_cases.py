"""What the tests of the operations between matrix products share: each form with its inputs and its formula."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf import ops


class Case(NamedTuple):
    operation: str
    make: Callable[
        [torch.dtype, str, int], tuple[Tensor, ...]
    ]  # dtype, device, tokens -> inputs, leaves need gradients
    ours: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]  # written out from the docstring
    order: float = 0.05  # more where a gradient sums over all tokens and channels: numerics.assert_no_worse


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def scalars(count: int, dtype: torch.dtype, device: str) -> Tensor:
    """As a model has them: not so near zero that what they multiply vanishes and its norm has no direction."""
    return (0.6 + 0.1 * torch.randn(count, device=device)).to(dtype).requires_grad_()


def rms(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


SCALE = 0.7


def residual(branch: bool, streams: int, keep_sum: bool = False, dim: int = 48) -> Case:
    def make(dtype, device, tokens):
        tensors = [leaf(tokens, dim, dtype=dtype, device=device) for _ in range(1 + branch + streams)]
        return *tensors, *([leaf(1 + streams, dim, dtype=dtype, device=device)] if streams else [])

    def split(tensors):
        x, others = tensors[0], list(tensors[1:])
        added = others.pop(0) if branch else None
        weights = others.pop() if streams else None
        return x, added, others, weights

    def ours(*tensors):
        if keep_sum:
            return ops.residual_sum_rms_norm(*split(tensors), SCALE)
        return ops.residual_rms_norm(*split(tensors), SCALE)

    def formula(*tensors):
        x, added, others, weights = split(tensors)
        u = x + added if branch else x
        m = u
        if streams:
            m = sum(weight * stream for weight, stream in zip(weights, (u, *others), strict=True))
        return *([u] if keep_sum else []), m, SCALE * m / rms(m)

    return Case("residual_rms_norm", make, ours, formula)


def queries_and_keys(heads: int, kv_heads: int, head_dim: int, half: int, rows: int = 2) -> Case:
    def make(dtype, device, tokens):
        q, k = (leaf(rows, tokens, n, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        angle = 7 * torch.randn(tokens, half, device=device)
        return q, k, angle.cos().to(dtype), angle.sin().to(dtype), leaf(heads, dtype=dtype, device=device)

    def formula(q, k, cos, sin, gain):
        return turned(q, cos, sin, gain.unsqueeze(-1)), turned(k, cos, sin, 1)

    return Case("qk_norm_rope", make, ops.qk_norm_rope, formula)


def turned(x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | int) -> Tensor:
    half, n, c, s = cos.shape[1], x / rms(x), cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = n[..., :half], n[..., half : 2 * half]
    return torch.cat((a * c + b * s, b * c - a * s, n[..., 2 * half :]), -1) * factor


def joined(
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    readers: int = 1,
    extra: int = 0,
    unused: int = 0,
    rows: int = 2,
) -> Case:
    """Queries, keys and values as columns of one tensor."""

    def make(dtype, device, tokens):
        columns = (heads + 2 * kv_heads) * head_dim + extra + unused
        angle = 7 * torch.randn(tokens, half, device=device)
        tables = angle.cos().to(dtype), angle.sin().to(dtype)
        tensors = (leaf(*shape, dtype=dtype, device=device) for shape in ((rows, tokens, columns), (heads,)))
        projected, gain = tensors
        return projected, *tables, gain

    def ours(projected, cos, sin, gain):
        q, k, values, others = ops.qkv_norm_rope(projected, cos, sin, gain, kv_heads, head_dim, readers, extra)
        return q, k, *values, *([others] if extra else [])

    def formula(projected, cos, sin, gain):
        ends = [heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in projected.tensor_split(ends, -1)[:3])
        others = [projected[..., ends[-1] : ends[-1] + extra]] if extra else []
        return turned(q, cos, sin, gain.unsqueeze(-1)), turned(k, cos, sin, 1), *([v] * readers), *others

    return Case("qkv_norm_rope", make, ours, formula)


def exclusive(gate: bool, heads: int, kv_heads: int, head_dim: int) -> Case:
    def make(dtype, device, tokens):
        y, v = (leaf(tokens, n, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        return y, v, *([leaf(tokens, heads, dtype=dtype, device=device)] if gate else [])

    def ours(y, v, logits=None):
        return (ops.xsa_gate(y, v, logits, 2.0, 0.5),)

    def formula(y, v, logits=None):
        u = (v / v.square().sum(-1, keepdim=True).sqrt()).repeat_interleave(heads // kv_heads, -2)
        out = y - (y * u).sum(-1, keepdim=True) * u
        return (out if logits is None else out * (2 / (1 + torch.exp(-0.5 * logits))).unsqueeze(-1),)

    return Case("xsa_gate", make, ours, formula)


def two_lanes(lanes: int, branches: int, skip: bool, dim: int = 48) -> Case:
    """`keep` and `post` are one tensor here, as the gate below."""
    wide = lanes + branches + 1 + skip

    def make(dtype, device, tokens):
        tensors = [leaf(tokens, dim, dtype=dtype, device=device) for _ in range(wide)]
        return *tensors, scalars(6, dtype, device), leaf(2 + 2 * skip, dim, dtype=dtype, device=device)

    def split(tensors):
        rows, (keep_and_post, weights) = list(tensors[:-2]), tensors[-2:]
        skips = (rows.pop(), weights[2:]) if skip else (None, None)
        keep, post, x0 = keep_and_post[:2], keep_and_post[2:].view(2, 2), rows.pop()
        return rows[:lanes], rows[lanes:], keep, post, x0, weights[:2], *skips

    def ours(*tensors):
        return ops.two_lane_rms_norm(*split(tensors), SCALE)

    def formula(*tensors):
        rows, added, keep, post, x0, mix, stored, weights = split(tensors)
        a, b = keep[0] * rows[0], keep[1] * rows[-1]
        for j, branch in enumerate(added):
            a, b = a + post[j, 0] * branch, b + post[j, 1] * branch
        if skip:
            a = weights[0] * a + weights[1] * stored
        m = mix[0] * a + mix[1] * x0
        return a, b, SCALE * m / rms(m), SCALE * b / rms(b)

    return Case("two_lane_rms_norm", make, ours, formula, order=0.25)


def embedding(vocabulary: int, dim: int, window: int, rows: int = 2) -> Case:
    """The gate's weight and strength are one tensor: the error of one sum says nothing where it is near zero."""

    def make(dtype, device, tokens):
        length = tokens + (tokens > 0)  # the first has none before it, and the second, here, always one
        chosen = torch.randint(vocabulary, (rows, length), device=device)
        starts = torch.rand(rows, length, device=device) < 0.1
        starts[:, 1:2] = False
        table = leaf(vocabulary, dim, dtype=dtype, device=device)
        return table, chosen, scalars(window + 1, dtype, device), starts

    def ours(table, tokens, gate, starts):
        return (ops.embedding_smear_norm(tokens, table, gate[None, :-1], gate[-1:], starts),)

    def formula(table, tokens, gate, starts):
        e = table[tokens]
        before = torch.cat((torch.zeros_like(e[:, :1]), e[:, :-1]), 1) * ~starts.unsqueeze(-1)
        s = e + gate[-1] * torch.sigmoid((e[..., :window] * gate[:-1]).sum(-1, keepdim=True)) * before
        return (s / rms(s),)

    return Case("embedding_smear_norm", make, ours, formula, order=0.25)


BY_ROW = ("qk_norm_rope", "qkv_norm_rope", "embedding_smear_norm")  # their tokens are those of one of two rows
CASES = {
    "add": residual(True, 0),
    "mix": residual(False, 1),
    "add + mix": residual(True, 1),
    "add + mix + skip": residual(True, 2),
    "add + mix, sum kept": residual(True, 1, keep_sum=True),
    "three streams": residual(False, 3),
    "part of a head": queries_and_keys(3, 1, 20, 4),
    "the whole head": queries_and_keys(4, 2, 16, 8),
    "of one product": joined(4, 2, 16, 8),
    "of one product, with gate": joined(3, 1, 20, 4, readers=2, extra=3, unused=2),
    "xsa": exclusive(False, 4, 2, 24),
    "xsa + gate": exclusive(True, 6, 2, 24),
    "lanes part": two_lanes(1, 1, skip=True),
    "lanes part, nothing to add": two_lanes(1, 0, skip=False),
    "two lanes": two_lanes(2, 2, skip=False),
    "two lanes + skip": two_lanes(2, 2, skip=True),
    "embedding": embedding(31, 40, 12),
}
RECORD = {  # at the record's widths, for a GPU
    "add": residual(True, 0, dim=512),
    "mix": residual(False, 1, dim=512),
    "add + mix": residual(True, 1, dim=512),
    "add + mix + skip": residual(True, 2, dim=512),
    "add + mix, sum kept": residual(True, 1, keep_sum=True, dim=512),
    "three streams": residual(False, 3, dim=512),
    "qk": queries_and_keys(8, 4, 64, 8),
    "qkv": joined(8, 4, 64, 8, readers=2, extra=8, unused=56),
    "xsa + gate": exclusive(True, 8, 4, 64),
    "lanes part": two_lanes(1, 1, skip=True, dim=512),
    "two lanes": two_lanes(2, 2, skip=False, dim=512),
    "two lanes + skip": two_lanes(2, 2, skip=True, dim=512),
    "embedding": embedding(8192, 512, 12, rows=1),
}


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
