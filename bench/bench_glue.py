"""The operations between matrix products at the record's shape, beside the plain functions, eager and by torch.compile.

Each forward alone and with its backward. The inputs are those of the step: one rank's 98,304 tokens in bfloat16. What
decides FUSED_GLUE is the compiled model's step (bench_training_step.py), not this.
"""

import math

import pytest
import torch

from bench.harness.measure import Work
from bench.harness.shapes import SHAPES, name
from bench.step_model import compiled_traffic as plain
from pgolf import ops
from pgolf.model.skips import skip_weights
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: plain functions elsewhere")
DEVICE = "cuda"
TOKENS, DIM, HEADS, KV_HEADS, HEAD_DIM, HALF = 98_304, 512, 8, 4, 64, 8
TABLE_SHAPE = (8192, DIM)


def residual(branch: bool, streams: int):
    """Inputs in the order of the plain function: x, branch, embedding and its mix, skip, its weight and gate."""
    shapes = [(1, TOKENS, DIM)] * (1 + branch)
    shapes += [(1, TOKENS, DIM), (2, DIM)] * (streams > 0)
    shapes += [(1, TOKENS, DIM), (DIM,), (DIM,)] * (streams > 1)

    def ours(x, *others):
        others = list(others)
        added = others.pop(0) if branch else None
        if not streams:
            return ops.residual_rms_norm(x, added, scale=plain.SCALE)
        x0, mix, *skip = others
        weights, others = [mix[0], mix[1]], [x0]
        if skip:
            stored, weight, gate = skip
            kept = torch.sigmoid(gate)
            weights, others = [mix[0] * kept, mix[1], mix[0] * (1 - kept) * weight], [x0, stored]
        return ops.residual_rms_norm(x, added, others, torch.stack(weights), plain.SCALE)

    return shapes, ours


def queries_and_keys(q, k, cos, sin, gain):
    return ops.qk_norm_rope(q, k, cos, sin, gain)


def of_one_product(projected, cos, sin, gain):
    q, k, values, logits = ops.qkv_norm_rope(projected, cos, sin, gain, KV_HEADS, HEAD_DIM, readers=2, extra=HEADS)
    return q, k, *values, logits


def exclusive(y, v, logits):
    return (ops.xsa_gate(y, v, logits),)


def two_lanes(lanes: int):
    """Inputs as of compiled_traffic.two_lanes and parting, with a skip."""
    stream, by_channel = (1, TOKENS, DIM), (DIM,)
    scalars = [(2,), (2, 2)] * (lanes > 1)
    shapes = [stream] * (2 * lanes) + [*scalars, stream, (2, DIM), stream, by_channel, by_channel]

    def ours(*tensors):
        rows, (x0, mix, skip, weight, gate) = tensors[: 2 * lanes], tensors[-5:]
        if lanes == 1:
            keep, post = rows[0].new_ones(2), rows[0].new_ones(2, 2)
        else:
            keep, post = tensors[4:6]
        skips = skip, torch.stack(skip_weights(weight, gate))
        return ops.two_lane_rms_norm(rows[:lanes], rows[lanes:], keep, post, x0, mix, *skips, plain.SCALE)

    return shapes, ours


def random_tokens():
    return torch.randint(TABLE_SHAPE[0], (1, TOKENS), device=DEVICE)


def random_starts():
    """Of documents of 1,000 tokens."""
    return torch.rand(1, TOKENS, device=DEVICE) < 1e-3


def embedding(table, tokens, weight, strength, starts):
    return (ops.embedding_smear_norm(tokens, table, weight, strength, starts),)


Q, K, TABLE = (1, TOKENS, HEADS, HEAD_DIM), (1, TOKENS, KV_HEADS, HEAD_DIM), (TOKENS, HALF)
X = TOKENS * DIM
# Operation, shapes or what makes an input, ours, the plain function, elements moved forward and with the backward.
CASES = {
    "add": ("residual_rms_norm", *residual(True, 0), plain.add, 4 * X, 8 * X),
    "mix": ("residual_rms_norm", *residual(False, 1), plain.mix, 4 * X, 10 * X),
    "add + mix": ("residual_rms_norm", *residual(True, 1), plain.add_mix, 5 * X, 12 * X),
    "add + mix + skip": ("residual_rms_norm", *residual(True, 2), plain.add_mix_skip, 6 * X, 15 * X),
    "16 of 64 rotate": (
        "qk_norm_rope",
        [Q, K, TABLE, TABLE, (HEADS,)],
        queries_and_keys,
        qk_norm_rope_reference,
        3 * X,
        7.5 * X,
    ),
    "of one product, 16 of 64 rotate": (
        "qkv_norm_rope",
        [(1, TOKENS, 1088), TABLE, TABLE, (HEADS,)],
        of_one_product,
        plain.qkv_norm_rope,
        3 * X,
        9 * X + 72 * TOKENS,
    ),
    "with gate": ("xsa_gate", [Q, K, Q[:-1]], exclusive, plain.xsa_gate, 2.5 * X, 6.5 * X),
    "lanes part + skip": ("two_lane_rms_norm", *two_lanes(1), plain.parting, 8 * X, 20 * X),
    "two lanes + skip": ("two_lane_rms_norm", *two_lanes(2), plain.two_lanes, 10 * X, 26 * X),
    "smeared": (
        "embedding_smear_norm",
        [TABLE_SHAPE, random_tokens, (1, 12), (1,), random_starts],
        embedding,
        plain.embed,
        X + math.prod(TABLE_SHAPE),
        4 * X + 3 * math.prod(TABLE_SHAPE),
    ),
}


def random_inputs(shapes, dtype, backward, function):
    tensors = [
        shape()
        if callable(shape)
        else torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(backward and shape != TABLE)
        for shape in shapes
    ]
    if not backward:
        return tuple(tensors)
    with torch.no_grad():
        outs = function(*tensors)
    return *tensors, *(torch.randn_like(out) for out in outs)


def with_backward(function, inputs: int):
    def run(*arguments):
        tensors, upstream = arguments[:inputs], arguments[inputs:]
        return torch.autograd.grad(function(*tensors), [t for t in tensors if t.requires_grad], upstream)

    return run


@pytest.mark.parametrize("dtype", SHAPES.dtypes, ids=name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", CASES)
def test_glue(measure, case, direction, dtype):
    operation, shapes, ours, definition, forward_elements, all_elements = CASES[case]
    backward = direction != "forward"
    torch.compiler.reset()
    compiled = torch.compile(definition, fullgraph=True, dynamic=False)
    wrap = (lambda function: with_backward(function, len(shapes))) if backward else lambda function: function

    def make():
        return random_inputs(shapes, dtype, backward, definition)

    call = wrap(ours)
    call(*make())
    measure(
        operation,
        f"{case}, {direction}",
        shape="x".join(map(str, shapes[0][1:] if len(shapes[0]) > 2 else (TOKENS, DIM))),
        dtype=name(dtype),
        backend=ops.used()[operation],
        make=make,
        call=call,
        others={"torch.compile": wrap(compiled), "eager": wrap(definition)},
        peers={},
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        work=Work(bytes=round(all_elements if backward else forward_elements) * dtype.itemsize),
    )
