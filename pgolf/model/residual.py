"""The residual stream: its mix with the embedding, and parallel residuals."""

from torch import Tensor


def mix_with_embedding(x: Tensor, x0: Tensor, mix: Tensor) -> Tensor:
    """m_0 x + m_1 x_0 a channel, before each layer: mix (2, dim), begins at (1, 0); x_0 is the normalised embedding."""
    return mix[0] * x + mix[1] * x0


def route_to_lanes(
    lanes: tuple[Tensor, Tensor],
    attention: Tensor,
    mlp: Tensor,
    keep: Tensor,  # (2,)
    post: Tensor,  # (2, 2): from attention and from the MLP, to either lane
) -> tuple[Tensor, Tensor]:
    """Two-lane parallel residuals (PR #1529): lane_i ← keep_i lane_i + post_{0i} attention + post_{1i} mlp.

    Attention has read lane 0 and the MLP lane 1, neither the other's output. `keep` begins at 1.1, `post` at 1.
    """
    first, second = (keep[i] * lane + post[0, i] * attention + post[1, i] * mlp for i, lane in enumerate(lanes))
    return first, second


def merge_lanes(lanes: tuple[Tensor, Tensor], final_lane: str) -> Tensor:
    """What the final norm reads: the lanes' mean, or the lane of `attn` or `mlp`."""
    return 0.5 * (lanes[0] + lanes[1]) if final_lane == "mean" else lanes[("attn", "mlp").index(final_lane)]


SHARES = {"mean": (0.5, 0.5), "attn": (1.0, 0.0), "mlp": (0.0, 1.0)}  # of either lane in that
