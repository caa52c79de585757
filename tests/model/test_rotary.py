"""Rotary position embedding and its stretching."""

import math

import pytest
import torch

from pgolf.model.rotary import rotary_tables, score_scale
from pgolf.ops.qk_norm_rope import rotate


@pytest.mark.parametrize("scaling", ["none", "ntk", "yarn"])
@pytest.mark.parametrize("dims", [4, 8])
def test_scores_depend_on_the_distance_alone(scaling, dims):
    """Lengths are kept, dimensions past `dims` stay, and q_p · k_r is the same wherever p - r is."""
    q, k = torch.randn(2, 8, dtype=torch.float64)
    tables = rotary_tables(torch.arange(20), dims, 100.0, torch.float64, scaling, stretch=2.0, train_length=10)
    turned = [rotate(x.expand(1, 20, 1, 8), *tables)[0, :, 0] for x in (q, k)]
    for x, at in zip((q, k), turned, strict=True):
        torch.testing.assert_close(at.norm(dim=-1), x.norm().expand(20), rtol=1e-6, atol=1e-6)
        assert torch.equal(at[:, dims:], x[dims:].expand(20, -1))
    scores = turned[0] @ turned[1].T
    for distance in (0, 3, 11):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)


def test_stretching_divides_the_lowest_frequency_and_keeps_the_highest():
    def angles(scaling, stretch):
        cos, sin = rotary_tables(torch.tensor([1]), 16, 10_000.0, torch.float64, scaling, stretch, train_length=4096)
        return torch.atan2(sin, cos).flatten()

    plain = angles("none", 4.0)
    for scaling in ("ntk", "yarn"):
        assert torch.equal(angles(scaling, 1.0), plain)
        ratio = plain / angles(scaling, 4.0)
        assert ratio[0] == pytest.approx(1.0, abs=1e-4)
        assert ratio[-1] == pytest.approx(4.0, rel=1e-3)
        assert (ratio.diff() > -1e-4).all()
    assert score_scale("ntk", 4.0) == score_scale("yarn", 1.0) == 1.0
    assert score_scale("yarn", 4.0) == pytest.approx((0.1 * math.log(4) + 1) ** 2)
