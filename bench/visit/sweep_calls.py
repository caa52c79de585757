"""The launchers that sweeps time, on the inputs that they have in the record's step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgolf.triton_kernels import (
    embedding_smear_norm,
    leaky_relu2_mlp,
    newton_schulz,
    qk_norm_rope,
    qkv_norm_rope,
    residual_rms_norm,
    softcapped_cross_entropy,
    two_lane_rms_norm,
    xsa_gate,
)

EPS, SCALE, SOFTCAP, SLOPE = 1e-6, 0.5, 30.0, 0.5


@dataclass(frozen=True)
class Sizes:
    tokens: int = 98_304
    dim: int = 512
    hidden: int = 2048
    classes: int = 8192
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    half: int = 8
    banks: tuple[int, int, int, int] = (22, 11, 3, 2)  # matrices of a bank of each kind, and of one rank's
    repeat: int = 10  # calls that are timed as one, of kernels that take microseconds
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def columns(self) -> int:
        """Of the one product: queries, keys, values, a gate a head, and what fills up to 64."""
        return -(-((self.heads + 2 * self.kv_heads) * self.head_dim + self.heads) // 64) * 64


RECORD = Sizes()
STATIC = Sizes(tokens=128, banks=(2, 2, 2, 2), repeat=1, device="cpu")  # to compile: the record's where it matters
QUICK = Sizes(8, 64, 64, 256, banks=(1, 1, 1, 1), repeat=1, device="cpu", dtype=torch.float16)


@dataclass(frozen=True)
class Timed:
    """One launcher on the inputs of one place of the step."""

    name: str
    make: Callable[[], tuple]
    call: Callable[..., Any]
    weight: float  # launches of it in a step with looped layers
    place: int | None = None  # of what the launch's list holds for this kernel alone
    repeat: int = 1


def random(sizes: Sizes, *shape: int | tuple[int, ...]) -> Tensor:
    flat = [size for part in shape for size in (part if isinstance(part, tuple) else (part,))]
    return torch.randn(flat, device=sizes.device, dtype=torch.float32 if sizes.device == "cpu" else sizes.dtype).to(
        sizes.dtype
    )


def residuals(sizes: Sizes) -> tuple[Timed, ...]:
    def x(count: int) -> list[Tensor]:
        return [random(sizes, sizes.tokens, sizes.dim) for _ in range(count)]

    def weights(streams: int) -> Tensor | None:
        return random(sizes, 1 + streams, sizes.dim) if streams else None

    def forward(name: str, branch: bool, streams: int, kept: bool, weight: float) -> Timed:
        def call(weights: Tensor | None, x: Tensor, *others: Tensor) -> Any:
            added = others[0] if branch else None
            return residual_rms_norm.launch(x, added, list(others[branch:]), weights, SCALE, EPS, kept)

        return Timed(f"{name} forward", lambda: (weights(streams), *x(1 + branch + streams)), call, weight, 0)

    def backward(name: str, branch: bool, streams: int, kept: bool, mixed: bool, weight: float) -> Timed:
        def call(weights: Tensor | None, x: Tensor, *others: Tensor) -> Any:
            added, others = (others[0], others[1:]) if branch else (None, others)
            upstream = list(others[streams:])
            kept_grad, mixed_grad = (upstream.pop() if given else None for given in (kept, mixed))
            return residual_rms_norm.launch_backward(
                x, added, list(others[:streams]), weights, kept_grad, mixed_grad, upstream[0], SCALE, EPS
            )

        return Timed(
            f"{name} backward",
            lambda: (weights(streams), *x(2 + branch + streams + kept + mixed)),
            call,
            weight,
            1 + streams,
        )

    return (
        forward("add", True, 0, False, 14),
        backward("add", False, 0, False, True, 14),
        forward("add + mix, sum kept", True, 1, True, 7),
        backward("add + mix, sum kept", False, 1, True, True, 7),
        forward("add + mix + skip", True, 2, False, 5),
        backward("add + mix + skip", True, 2, False, True, 5),
        backward("merge", False, 3, False, False, 1),
    )


def heads(sizes: Sizes) -> tuple[Timed, ...]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim

    def parts(joined: Tensor) -> tuple[Tensor, Tensor]:
        q, k = joined[:, :queries], joined[:, queries : queries + keys]
        return q.unflatten(1, (-1, sizes.head_dim)), k.unflatten(1, (-1, sizes.head_dim))

    def inputs() -> tuple[Tensor, ...]:
        table = random(sizes, sizes.tokens, sizes.half), random(sizes, sizes.tokens, sizes.half)
        return random(sizes, sizes.tokens, sizes.columns), *table, random(sizes, sizes.heads)

    def gradients() -> tuple[Tensor, ...]:
        q = random(sizes, sizes.tokens, sizes.heads, sizes.head_dim)
        others = (random(sizes, sizes.tokens, sizes.kv_heads, sizes.head_dim) for _ in range(3))
        return *inputs(), q, *others, random(sizes, sizes.tokens, sizes.heads)

    def forward(joined: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> Any:
        return qk_norm_rope.launch(*parts(joined), cos, sin, gain, EPS)

    def apart(
        joined: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, q_grad: Tensor, k_grad: Tensor, *_: Tensor
    ) -> Any:
        return qk_norm_rope.launch_backward(*parts(joined), cos, sin, gain, q_grad, k_grad, EPS)

    def backward(joined: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, *upstream: Tensor) -> Any:
        return qkv_norm_rope.launch_backward(*parts(joined), cos, sin, gain, *upstream, 2, sizes.columns, EPS)

    return (
        Timed("forward", inputs, forward, 17, 0),
        Timed("backward of one product", gradients, backward, 17, 2),
        Timed("backward", gradients, apart, 0, 1),
    )


def gates(sizes: Sizes) -> tuple[Timed, ...]:
    first = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    last = first + sizes.kv_heads * sizes.head_dim

    def inputs() -> tuple[Tensor, ...]:
        y, upstream = (random(sizes, sizes.tokens, sizes.heads, sizes.head_dim) for _ in range(2))
        return random(sizes, sizes.tokens, sizes.columns), y, upstream

    def arguments(joined: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = joined[:, first:last].unflatten(1, (-1, sizes.head_dim))
        return y, values, joined[:, last : last + sizes.heads]

    def forward(joined: Tensor, y: Tensor, _: Tensor) -> Any:
        return xsa_gate.launch(*arguments(joined, y), 1.0, 1.0)

    def backward(joined: Tensor, y: Tensor, upstream: Tensor) -> Any:
        return xsa_gate.launch_backward(*arguments(joined, y), upstream, 1.0, 1.0)

    return Timed("forward", inputs, forward, 17), Timed("backward", inputs, backward, 17)


def lanes(sizes: Sizes) -> tuple[Timed, ...]:
    def inputs(lanes: int, upstream: int) -> tuple[Tensor, ...]:
        weights = (random(sizes, count) for count in ((2,), (2, 2), (2, sizes.dim), (2, sizes.dim)))
        return *weights, *(random(sizes, sizes.tokens, sizes.dim) for _ in range(2 * lanes + 2 + upstream))

    def arguments(lanes: int, keep: Tensor, post: Tensor, mix: Tensor, skips: Tensor, *streams: Tensor) -> list:
        first, branches = list(streams[:lanes]), list(streams[lanes : 2 * lanes])
        x0, skip, *upstream = streams[2 * lanes :]
        return [first, branches, keep, post, x0, mix, skip, skips, *([upstream] if upstream else [])]

    def of(name: str, lanes: int, backward: bool, weight: float) -> Timed:
        launch = two_lane_rms_norm.launch_backward if backward else two_lane_rms_norm.launch
        return Timed(
            f"{name} {'backward' if backward else 'forward'}",
            lambda: inputs(lanes, 4 if backward else 0),
            lambda *tensors: launch(*arguments(lanes, *tensors), SCALE, EPS),
            weight,
            int(backward),
        )

    return (
        of("two lanes + skip", 2, False, 2),
        of("two lanes + skip", 2, True, 2),
        of("lanes part + skip", 1, False, 1),
        of("lanes part + skip", 1, True, 1),
    )


def embeddings(sizes: Sizes) -> tuple[Timed, ...]:
    def inputs() -> tuple[Tensor, ...]:
        tokens = torch.randint(sizes.classes, (sizes.tokens,), device=sizes.device)
        starts = torch.rand(sizes.tokens, device=sizes.device) < 1e-3
        table, weight, strength = (random(sizes, *shape) for shape in ((sizes.classes, sizes.dim), (12,), (1,)))
        return random(sizes, sizes.tokens, sizes.dim), tokens, table, weight, strength, starts

    def forward(_: Tensor, *inputs: Tensor) -> Any:
        return embedding_smear_norm.launch(*inputs, sizes.tokens, EPS)

    def backward(upstream: Tensor, *inputs: Tensor) -> Any:
        return embedding_smear_norm.launch_backward(*inputs, upstream, sizes.tokens, EPS)

    return Timed("forward", inputs, forward, 1, 0), Timed("backward", inputs, backward, 1, 1)


def losses(sizes: Sizes) -> tuple[Timed, ...]:
    def inputs() -> tuple[Tensor, ...]:
        logits = random(sizes, sizes.tokens, sizes.classes).mul_(5)
        return logits, torch.randint(sizes.classes, (sizes.tokens,), device=sizes.device)

    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        softcapped_cross_entropy.launch(logits, targets, losses, SOFTCAP, -100)
        return losses

    def both(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = logits.new_empty(logits.shape[0], dtype=torch.float32), torch.empty_like(logits)
        scale = torch.ones(1, device=logits.device)
        softcapped_cross_entropy.launch(logits, targets, losses, SOFTCAP, -100, scale, gradient)
        return losses, gradient

    return Timed("forward + gradient", inputs, both, 1), Timed("forward", inputs, forward, 1)


def products(sizes: Sizes) -> tuple[Timed, ...]:
    def inputs() -> tuple[Tensor, Tensor]:
        return random(sizes, sizes.tokens, sizes.dim), random(sizes, sizes.hidden, sizes.dim).div_(sizes.dim**0.5)

    def gradients() -> tuple[Tensor, ...]:
        w_down = random(sizes, sizes.dim, sizes.hidden).div_(sizes.hidden**0.5)
        return random(sizes, sizes.tokens, sizes.dim), w_down, random(sizes, sizes.tokens, sizes.hidden).square_()

    return (
        Timed("up", inputs, lambda x, w: leaky_relu2_mlp.launch_up(x, w, SLOPE), 17, 0),
        Timed("gradient", gradients, lambda *tensors: leaky_relu2_mlp.launch_gradient(*tensors, SLOPE), 17, 1),
    )


def squares(sizes: Sizes, tile: int, full_weight: float, eighth_weight: float) -> tuple[Timed, ...]:
    full, rows, eighth, eighth_rows = sizes.banks
    n, m = sizes.dim, sizes.hidden

    def of(name: str, count: int, shape: tuple[int, int], weight: float) -> Timed:
        def make() -> tuple[Tensor]:
            x = random(replace(sizes, dtype=torch.float16), count, *shape).div_((shape[0] * shape[1]) ** 0.5)
            return (x,)

        def call(x: Tensor) -> Tensor:
            if name == "aI + bG + cG²":
                return newton_schulz.symmetric_product(x, x, 0.5, 2.0, x, 3.0, tile=tile)
            short_first = x.mT if shape[0] > shape[1] else x
            return newton_schulz.symmetric_product(short_first, short_first, tile=tile)

        label = f"{name} {count}x{shape[0]}x{shape[1]}" + (", other tile" if not weight else "")
        return Timed(label, make, call, weight, repeat=sizes.repeat)

    return (
        of("gram", full, (n, n), 5 * full_weight),
        of("aI + bG + cG²", full, (n, n), 5 * full_weight),
        of("gram", rows, (n, m), 3 * full_weight),
        of("gram", rows, (m, n), 3 * full_weight),
        of("aI + bG + cG²", rows, (n, n), 22 * full_weight),
        of("gram", eighth, (n, n), 5 * eighth_weight),
        of("aI + bG + cG²", eighth, (n, n), 5 * eighth_weight),
        of("gram", eighth_rows, (m, n), 6 * eighth_weight),
    )
