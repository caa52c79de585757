"""The residual stream between two branches, plain and fused; and skips."""

import pytest
import torch

from pgolf import ops
from pgolf.model.residual import add_branch, add_mix_norm, add_norm
from pgolf.model.skips import Skip, add_skip, skip_weights
from pgolf.ops.residual_rms_norm import residual_rms_norm_reference


def by_formula(x, branch, skip, x0, mix, scale):
    u = x + branch if branch is not None else x
    m = u
    if skip is not None:
        kept = torch.sigmoid(skip.gate) if skip.gate is not None else 1.0
        m = kept * u + (1 - kept if skip.gate is not None else 1.0) * skip.weight * skip.output
    m = mix[0] * m + mix[1] * x0
    return u, m, scale * m / (m.square().mean(-1, keepdim=True) + torch.finfo(m.dtype).eps).sqrt()


@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize("skipped", ["gated", "plain", "no"])
def test_both_bodies_are_the_formula(branched, skipped):
    """Values and gradients before a layer, in float64."""
    x, added, stored, x0 = torch.randn(4, 2, 5, 8, dtype=torch.float64).requires_grad_()
    weight, gate, mix = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((8,), (8,), (2, 8)))
    branch = added if branched else None
    skip = None if skipped == "no" else Skip(stored, weight, gate if skipped == "gated" else None)
    inputs = [x, added, stored, x0, weight, gate, mix]
    found = []
    for body in (by_formula, lambda *a: add_mix_norm(*a, False, True), lambda *a: add_mix_norm(*a, True, True)):
        outs = body(x, branch, skip, x0, mix, 0.7)
        loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outs))
        found.append([*outs, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_the_plain_body_is_the_operations_definition():
    x, branch, x0 = torch.randn(3, 4, 8)
    mix = torch.randn(2, 8)
    _, *mixed = add_mix_norm(x, branch, None, x0, mix, 0.5, fused=False, keep_sum=False)
    added = add_norm(x, branch, 0.5, fused=False)
    assert torch.equal(added[0], add_branch(x, branch))
    with ops.backend("reference"):  # the CPU's, too
        backend = ops.residual_rms_norm(x, branch, [x0], mix, 0.5), ops.residual_rms_norm(x, branch, scale=0.5)
    definition = (
        residual_rms_norm_reference(x, branch, [x0], mix, 0.5),
        residual_rms_norm_reference(x, branch, scale=0.5),
    )
    for found in ((mixed, added), backend):
        assert all(
            torch.equal(a, b) for pair in zip(found, definition, strict=True) for a, b in zip(*pair, strict=True)
        )


@pytest.mark.parametrize("gated", [True, False])
def test_a_skip_is_a_sum_with_weights_by_channel(gated):
    x, output = torch.randn(2, 5, 8, dtype=torch.float64)
    skip = Skip(output, *torch.randn(2, 8, dtype=torch.float64))
    skip = skip if gated else skip._replace(gate=None)
    kept, added = skip_weights(skip.weight, skip.gate)
    torch.testing.assert_close(add_skip(x, *skip), kept * x + added * output)
