"""Two lanes: where they begin, how they part and merge, plain and fused."""

import pytest
import torch
from plain_model import plain_logits

from pgolf import ops
from pgolf.model import Execution
from pgolf.model.execution import FUSABLE
from pgolf.model.lanes import Routing, merge_lanes, part_lanes, route_lanes
from pgolf.model.skips import Skip
from pgolf.ops.two_lane_rms_norm import two_lane_rms_norm_reference


@pytest.mark.parametrize("lane", ["attn", "mlp"])
def test_lanes_that_part_at_once_and_merge_into_one_fused(lane, random_model):
    """With four layers the first of the second half takes back at once what was stored last."""
    model = random_model(num_layers=4, parallel_start_layer=2, parallel_final_lane=lane)
    tokens = torch.randint(64, (1, 9))
    plain = model(tokens)
    model.execute(Execution(torch.float64, fused=FUSABLE))
    torch.testing.assert_close(model(tokens), plain)


@pytest.mark.parametrize("lane", ["attn", "mlp"])
def test_either_lane_may_be_the_last(lane, random_model):
    model = random_model(parallel_start_layer=3, parallel_final_lane=lane)
    tokens = torch.tensor([3, 5, 60, 1, 7])
    torch.testing.assert_close(model(tokens[None])[0], plain_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_two_lanes_begin_in_the_second_half_at_the_earliest(small_config):
    for layers, start, first in ((6, 1, 3), (6, 4, 4), (3, 1, 1), (2, 1, 1)):
        config = small_config(num_layers=layers, parallel_start_layer=start)
        assert [visit.layer for visit in config.visits(False) if config.two_lanes(visit)] == list(range(first, layers))


@pytest.mark.parametrize("gated", [True, False])
def test_plain_and_fused_bodies_compute_the_same(gated):
    """Values and gradients of a stream that parts, goes through one layer and merges, in float64."""
    x, branch, stored, x0, attention, mlp = torch.randn(6, 2, 5, 8, dtype=torch.float64).requires_grad_()
    weight, gate, mix, keep, post = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((8,), (8,), (2, 8), (2,), (2, 2))
    )
    skip = Skip(stored, weight, gate if gated else None)
    found = []
    for fused in (False, True):
        lanes, *parted = part_lanes(x, branch, skip, x0, mix, 0.7, fused)
        routing = Routing([attention, mlp], keep, post)
        lanes, *routed = route_lanes(lanes, routing, skip, x0, mix, 0.7, fused)
        outs = [*parted, *lanes, *routed, merge_lanes(lanes, routing, "mean", fused)]
        inputs = [x, branch, stored, x0, attention, mlp, weight, mix, keep, post, *([gate] if gated else [])]
        found.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)])
    torch.testing.assert_close(found[1], found[0])


def test_the_plain_body_is_the_operations_definition():
    first, second, attention, mlp, x0 = torch.randn(5, 3, 8)
    keep, post, mix = torch.randn(2), torch.randn(2, 2), torch.randn(2, 8)
    routing = Routing([attention, mlp], keep, post)
    lanes, *norms = route_lanes((first, second), routing, None, x0, mix, 0.5, fused=False)
    expected = two_lane_rms_norm_reference([first, second], [attention, mlp], keep, post, x0, mix, scale=0.5)
    for mine, theirs in zip([*lanes, *norms], expected, strict=True):
        assert torch.equal(mine, theirs)
    with ops.backend("reference"):  # the CPU's, too
        found = ops.two_lane_rms_norm([first, second], [attention, mlp], keep, post, x0, mix, scale=0.5)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
