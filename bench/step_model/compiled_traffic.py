"""Bytes that torch.compile plans to move for the model's plain functions between matrix products.

    python -m bench.step_model.compiled_traffic

Each function is compiled, forward and backward, and the scheduler's kernels are asked what they read and write, each
buffer of a kernel once. The plan is the CPU's, which fuses a little less than a GPU's. In X = tokens x 512 x 2 bytes;
figures of `traffic.COMPILED_X` are from here.
"""

from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.scheduler import Scheduler

from pgolf.model.lanes import Routing, merge_lanes, part_lanes, route_lanes
from pgolf.model.residual import add_mix_norm, add_norm
from pgolf.model.skips import Skip
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference
from pgolf.ops.qkv_norm_rope import qkv_norm_rope_reference
from pgolf.ops.xsa_gate import xsa_gate_reference

TOKENS, DIM, VOCABULARY = 4096, 512, 341  # of tokens to a row of the table as in the record
X = TOKENS * DIM * 2
SCALE = 0.5  # of a norm


def add(x, branch):
    return add_norm(x, branch, SCALE, fused=False)


def mix(x, x0, weights):
    return add_mix_norm(x, None, None, x0, weights, SCALE, fused=False, keep_sum=False)[1:]


def add_mix(x, branch, x0, weights):
    return add_mix_norm(x, branch, None, x0, weights, SCALE, fused=False, keep_sum=False)[1:]


def add_mix_skip(x, branch, x0, weights, *skip):
    return add_mix_norm(x, branch, Skip(*skip), x0, weights, SCALE, fused=False, keep_sum=False)[1:]


def parting(x, branch, x0, weights, *skip):
    lanes, *norms = part_lanes(x, branch, Skip(*skip), x0, weights, SCALE, fused=False)
    return *lanes, *norms


def two_lanes(first, second, attention, mlp, keep, post, x0, weights, *skip):
    routing, returning = Routing([attention, mlp], keep, post), Skip(*skip) if skip else None
    lanes, *norms = route_lanes((first, second), routing, returning, x0, weights, SCALE, fused=False)
    return *lanes, *norms


def merge(first, second, attention, mlp, keep, post):
    return (merge_lanes((first, second), Routing([attention, mlp], keep, post), "mean", fused=False),)


def embed(table, tokens, weight, strength, starts):
    return (embedding_smear_norm_reference(tokens, table, weight, strength, starts),)


def scaled(function):
    """As the entries have it: the branch times a scale by channel, which the model folds into the branch's matrix."""
    return lambda x, branch, branch_scale, *others: function(x, branch_scale * branch, *others)


def qkv_norm_rope(projected, cos, sin, gain):
    """8 query and 4 key heads of 64, values for two readers, 8 logits."""
    q, k, (v, again), logits = qkv_norm_rope_reference(projected, cos, sin, gain, 4, 64, readers=2, extra=8)
    return q, k, v, again.view_as(again), logits


def xsa_gate(y, v, logits):
    return (xsa_gate_reference(y, v, logits),)


def cases() -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().requires_grad_()

    def stream() -> Tensor:
        return leaf(1, TOKENS, DIM)

    heads, keys = leaf(1, TOKENS, 8, 64), leaf(1, TOKENS, 4, 64)
    tables = torch.randn(2, TOKENS, 8).bfloat16().unbind(0)
    skip = stream(), leaf(DIM), leaf(DIM)
    embedding = stream(), leaf(2, DIM)
    residual = {
        "add": (add, ()),
        "add + mix": (add_mix, embedding),
        "add + mix + skip": (add_mix_skip, (*embedding, *skip)),
    }
    lanes = stream(), stream(), stream(), stream(), leaf(2), leaf(2, 2)
    tokens, starts = torch.randint(VOCABULARY, (1, TOKENS)), torch.rand(1, TOKENS) < 0.001
    return {
        "lanes part": (parting, (stream(), stream(), *embedding, *skip)),
        "two lanes": (two_lanes, (*lanes, *embedding)),
        "two lanes + skip": (two_lanes, (*lanes, *embedding, *skip)),
        "lanes merge": (merge, lanes),
        "embedding": (embed, (leaf(VOCABULARY, DIM), tokens, leaf(1, 12), leaf(1), starts)),
        "mix": (mix, (stream(), *embedding)),
        **{name: (function, (stream(), stream(), *others)) for name, (function, others) in residual.items()},
        **{
            f"{name}, scaled": (scaled(function), (stream(), stream(), leaf(DIM), *others))
            for name, (function, others) in residual.items()
        },
        "qk_norm_rope": (qk_norm_rope_reference, (heads, keys, *tables, leaf(8))),
        "qkv_norm_rope": (qkv_norm_rope, (leaf(1, TOKENS, 1088), *tables, leaf(8))),
        "xsa_gate": (xsa_gate, (heads, keys, leaf(1, TOKENS, 8))),
    }


def planned_bytes(function: Callable, inputs: tuple[Tensor, ...]) -> tuple[list[int], list[int], int]:
    """Bytes of each kernel, forward and backward, and bytes of tokens kept between the two."""
    kernels: list[int] = []
    emit = Scheduler.codegen

    def counting(self):
        kernels.extend(node.get_read_write_buffers_sizes() for node in self.nodes)
        return emit(self)

    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch._dynamo.reset()
    Scheduler.codegen = counting
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outs = torch.compile(function, fullgraph=True, dynamic=False)(*inputs)
        forward = kernels.copy()
        kernels.clear()
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    finally:
        Scheduler.codegen = emit
    return forward, kernels, sum(kept.values())


def main() -> None:
    torch._inductor.config.force_disable_caches = True  # what comes from a cache is not planned
    print(f"{'function':24}  total X  kept X  kernels forward | backward, X each")
    for name, (function, inputs) in cases().items():
        forward, backward, kept = planned_bytes(function, inputs)
        each = " | ".join(" ".join(f"{size / X:.2f}" for size in sizes) for sizes in (forward, backward))
        print(f"{name:24}  {(sum(forward) + sum(backward)) / X:7.2f}  {kept / X:6.2f}  {each}", flush=True)


if __name__ == "__main__":
    main()
