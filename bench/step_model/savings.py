"""What of a step's traffic could still be saved and is not built, by formulas: bytes, and what they are worth in time.

X is T x dim values of bfloat16, h = T x hidden_dim. A layer is counted each time it runs. Floors all of them: what is
said to stay in the L2 cache moves nothing, and no launch, synchronisation or half-filled wave costs time.

- MLP in chunks of tokens. Today forward x, h | h, y and backward dy, h, dz | dz, dx | dz, x | dy, h: with h = 4 X 34 X.
  In chunks h is written once and read once, dz never leaves the cache: x, h, y and dy, h, x, dx, 13 X. The products'
  FLOPs stay and bound the time (6 products of 2 T dim hidden_dim), so it is the bytes that fall, not the time.
- Head and loss in chunks (ops.linear_softcapped_cross_entropy): the final stream and its gradient, the weight, and its
  gradient in float32; no logits.
- q, k and v from one product: y is read once and not thrice, forward and for the weights, and one dy comes back.
- A norm without weights scales rows, so a product can read the stream itself and scale its result's rows (q and k,
  normed a head, not even that): y is never written.
- A branch added, mixed and squared in the epilogue of the product that makes it: neither written nor read (not in
  layers with two lanes).
- QK norm, rotation and gain in the epilogue of q's and k's products, the backward from the results (gains not 0).
- XSA and gate where attention's kernel ends: y and v are not read again; y is still written for the backward pass.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bench.kernels.static_report import BANDWIDTH, PEAK_FLOPS
from bench.step_model.operations import Operation, total_bytes
from bench.step_model.regions import GLUE
from pgolf.model import ModelConfig
from pgolf.model.recurrence import Visit

ITEM = 2  # bytes of bfloat16
L2_BYTES = 50e6  # H100; an H200 reports 60 MB
OURS = 0.75  # of it, at most, for what a chunk keeps alive
PROCESSORS = 132
TILES = ((128, 256), (128, 128))  # of a product's result, a thread block each
SPLITS = (1, 2, 4)  # of its sum over several blocks


@dataclass(frozen=True)
class Saving:
    """Of one step. `milliseconds`: what the least time falls by, by device."""

    name: str
    bytes_moved: float
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Chunks:
    """The MLP in chunks: tokens in one, bytes alive in its backward pass, share of the processors that tiles fill."""

    tokens: int
    live_bytes: int
    fill: float
    launches: int  # of products and their epilogues in a step, for today's `launches_today`
    launches_today: int
    product_us: float  # one product of one chunk, at the peak


def savings(
    fused: Iterable[Operation],
    least: Iterable[Operation],
    config: ModelConfig,
    looping: bool,
    tokens: int,
    one_product: bool,
) -> list[Saving]:
    """From the step with our operations, largest class first; each is counted after those before it."""
    fused, least = list(fused), list(least)
    visits = config.visits(looping)
    x, k = tokens * config.model_dim * ITEM, tokens * config.num_kv_heads * config.head_dim * ITEM
    branches = 2 * sum(not config.two_lanes(visit) for visit in visits)
    norms = 1 + sum(_norms(config, visit) for visit in visits)
    exclusive = sum(config.excludes_self(visit.layer) for visit in visits)
    glue = total_bytes(fused, GLUE) - total_bytes(least, GLUE)
    found = [
        _glue("the fused operations at their least, above", glue),
        _mlp(fused, config, len(visits), tokens),
        _head(fused, config, tokens),
        *([] if one_product else [_one_product(config, len(visits), tokens)]),
        _glue("norms as row scales of the products", norms * x),
        _glue("residual adds and mixes in the products' epilogues", 2 * branches * x),
        _glue("QK norm, RoPE, gain in the products' epilogues", 2 * len(visits) * (x + k)),
        _glue("XSA, gate where attention ends", exclusive * (x + k)),
    ]
    return [saving for saving in found if saving.bytes_moved > 0]


def mlp_chunks(config: ModelConfig, looping: bool, tokens: int) -> Chunks | None:
    """The chunk whose products fill the processors best, of those that fit the cache; None if none fits."""
    dim, hidden, layers = config.model_dim, config.hidden_dim, len(config.visits(looping))
    found = []
    for chunk in range(128, tokens + 1, 128):
        live = _live_bytes(config, chunk)
        if live > OURS * L2_BYTES:
            break
        shapes = [(chunk, hidden), (chunk, dim)] * 2 + [(hidden, dim)] * 2  # results of the six products
        fill = len(shapes) / sum(1 / _fill(*shape) for shape in shapes)
        count = layers * len(shapes) * math.ceil(tokens / chunk)
        seconds = 2 * chunk * dim * hidden / PEAK_FLOPS
        found.append(Chunks(chunk, live, fill, count, layers * len(shapes), 1e6 * seconds))
    return max(found, key=lambda chunks: (round(chunks.fill, 2), chunks.tokens), default=None)


def _live_bytes(config: ModelConfig, chunk: int) -> int:
    """x, dy, dx, h, dz; both weights and their gradients in float32."""
    weights = 2 * config.model_dim * config.hidden_dim
    return chunk * (3 * config.model_dim + 2 * config.hidden_dim) * ITEM + weights * (ITEM + 4)


def _fill(rows: int, columns: int) -> float:
    """Of the processors, over the whole waves that the tiles of a product need."""
    blocks = [math.ceil(rows / r) * math.ceil(columns / c) * split for r, c in TILES for split in SPLITS]
    return max(count / (PROCESSORS * math.ceil(count / PROCESSORS)) for count in blocks)


def _glue(name: str, size: float) -> Saving:
    return Saving(name, size, {device: 1e3 * size / bandwidth for device, bandwidth in BANDWIDTH.items()})


def _instead(name: str, now: Iterable[Operation], then: Iterable[Operation]) -> Saving:
    now, then = list(now), list(then)
    times = {d: sum(o.milliseconds(d) for o in now) - sum(o.milliseconds(d) for o in then) for d in BANDWIDTH}
    return Saving(name, total_bytes(now) - total_bytes(then), times)


def _product(part: str, size: float, flops: float, count: int) -> Operation:
    return Operation("", part, "", False, size, flops, count)


def _mlp(fused: list[Operation], config: ModelConfig, layers: int, tokens: int) -> Saving:
    dim, hidden = config.model_dim, config.hidden_dim
    x, h, weight = tokens * dim * ITEM, tokens * hidden * ITEM, dim * hidden * ITEM
    flops = 2 * tokens * dim * hidden
    then = [
        _product("MLP", 2 * x + h + 2 * weight, 2 * flops, layers),
        _product("MLP", 3 * x + h + 4 * weight, 4 * flops, layers),
    ]
    return _instead("MLP in chunks of tokens", (o for o in fused if o.part == "MLP"), then)


def _head(fused: list[Operation], config: ModelConfig, tokens: int) -> Saving:
    shape = tokens, config.model_dim, config.vocab_size
    now = [o for o in fused if o.part == "loss"]
    if any("linear" in o.name for o in now):  # it is built
        return Saving("", 0, {})
    now.append(_product("matrix products", _bytes(*shape), _flops(*shape), 3))
    weight = config.vocab_size * config.model_dim * ITEM
    then = _product("loss", 2 * tokens * config.model_dim * ITEM + 3 * weight + 12 * tokens, 3 * _flops(*shape), 1)
    return _instead("head and loss in chunks", now, [then])


def _one_product(config: ModelConfig, layers: int, tokens: int) -> Saving:
    dim, out = config.model_dim, config.num_kv_heads * config.head_dim
    sizes = {(tokens, dim, dim): 1, (tokens, dim, out): 2}
    now = [_product("matrix products", _bytes(*shape), _flops(*shape), 3 * layers * n) for shape, n in sizes.items()]
    whole = tokens, dim, dim + 2 * out
    then = [_product("matrix products", _bytes(*whole), _flops(*whole), 3 * layers)]
    now.append(_product(GLUE[1], 2 * tokens * dim * ITEM, 0, layers))  # dy of the two further products
    return _instead("q, k and v from one product", now, then)


def _bytes(rows: int, inner: int, columns: int) -> int:
    return (rows * inner + inner * columns + rows * columns) * ITEM


def _flops(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _norms(config: ModelConfig, visit: Visit) -> int:
    return 1 if config.parallel(visit.layer) and not config.two_lanes(visit) else 2
