"""Least bytes of what lies between the matrix products of a step, if each part is one kernel a pass.

    region                 one forward pass reads -> writes          one backward pass reads -> writes
    add, mix, norm         x, branches, x0, skip -> m, y, stored u   dm, dy, du, x, branches (or u), x0, skip
                                                                     -> dx, d x0, dskip
    add, norm              x, branches -> x', y                      dx', dy, x' -> dx
    two lanes              lanes, attention, MLP, x0, skip           dlanes, dy, dy', all inputs
                           -> lanes, y, y'                           -> dlanes, dattention, dMLP, d x0, dskip
    QK norm, RoPE, gain    q, k -> q', k'                            dq', dk', q, k -> dq, dk
    XSA, gate              y, v -> y'                                dy', y, v -> dy, dv; attention's dv + dv -> dv
    embedding, SmearGate   table -> x0                               d x0, table, the head's -> the table's gradient
    sum of x0's gradients                                            d x0 of each mix
    sum of dy                                                        dy of each further product that read y

Activations are bfloat16, T x dim (X bytes); q, y as that, k and v T x kv_dim. dy arrives as one tensor a matrix product
that read y: three where q, k and v did; if one product makes those, dq, dk and both dv become one tensor, in the
region of QK norm. Both sums are made where the sum is needed, so they only read. Gradients of per-channel and per-head
parameters are summed in the same pass. The scale of a branch is folded into the rows of the projection that makes it,
so it costs no pass and the branch's gradient is that of the stream. Statistics of norms are computed again, not stored.
Left out, all below 2%: rotary tables, gates (one number a token and head), parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pgolf.model import ModelConfig

MIX, ADD, LANES, QK, XSA, EMBED, SUM_X0, SUM_DY = (
    "residual add, skip, mix with x0, norm",
    "residual add, norm",
    "two lanes: route, mix, norms",
    "QK norm, RoPE, gain",
    "XSA, gate",
    "embedding, SmearGate, norm",
    "sum of x0's gradients",
    "sum of a norm's gradients from q, k, v, gate",
)
REGIONS = (MIX, ADD, LANES, QK, XSA, EMBED, SUM_X0, SUM_DY)
ITEM = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Pass:
    """One place of the model where a region stands, run once forward and once backward; a sum is that of all places."""

    region: str
    forward_bytes: int
    backward_bytes: int


def fused_passes(config: ModelConfig, looping: bool, tokens: int, one_product: bool = False) -> list[Pass]:
    """Every glue region of one step, in the order of the forward pass. `one_product`: of q, k and v."""
    return list(_passes(config, looping, tokens, one_product))


def _passes(config: ModelConfig, looping: bool, tokens: int, one_product: bool) -> Iterator[Pass]:
    x, k = tokens * config.model_dim * ITEM, tokens * config.num_kv_heads * config.head_dim * ITEM
    table = config.vocab_size * config.model_dim
    yield Pass(EMBED, table * ITEM + x, x + 2 * table * ITEM + 4 * table * 4)
    branches = 0  # of the layer before, not yet added
    further = 0
    before_stores = lanes = False
    for visit in config.visits(looping):
        skip = visit.skip is not None
        two = config.two_lanes(visit)
        parallel = not two and config.parallel(visit.layer)
        further += (0 if one_product else 2) + parallel  # products that read y, but for one each time
        if lanes:
            yield Pass(LANES, *_lanes(x, mix=True, skip=skip))
        elif two:  # they part: the second one is the stream before skip and mix, with a norm of its own
            forward, backward = _mix(x, branches, skip, True)
            yield Pass(LANES, forward + x, backward + x)
        else:
            yield Pass(MIX, *_mix(x, branches, skip, before_stores))
        sum_dv = 3 * k if config.excludes_self(visit.layer) else 0
        yield Pass(QK, 2 * (x + k), 3 * (x + k) + sum_dv * one_product)
        yield from _output(config, visit.layer, x, k, sum_dv * (not one_product))
        if not (two or parallel):
            yield Pass(ADD, 4 * x, 4 * x)
        lanes, before_stores = two, visit.stores
        branches = 2 if parallel else 1
    yield Pass(LANES, *_lanes(x, mix=False)) if lanes else Pass(ADD, (2 + branches) * x, (3 + branches) * x)
    yield Pass(SUM_X0, 0, x * len(config.visits(looping)))
    yield Pass(SUM_DY, 0, x * further)


def _mix(x: int, branches: int, skip: bool, keeps_sum: bool) -> tuple[int, int]:
    later = branches > 0  # in the first layer x is x0, with no branch to add
    inputs = 1 + branches + later + skip
    again = inputs - branches if keeps_sum else inputs
    return (inputs + 2 + keeps_sum) * x, (2 + keeps_sum + again + 1 + later + skip) * x


def _lanes(x: int, mix: bool, skip: bool = False) -> tuple[int, int]:
    """From both lanes and both branches of a layer to the next one, or to the final norm."""
    if not mix:
        return 5 * x, (1 + 4 + 4) * x
    inputs = 4 + 1 + skip
    return (inputs + 4) * x, (2 + 2 + inputs + 4 + 1 + skip) * x


def _output(config: ModelConfig, layer: int, x: int, k: int, sum_dv: int) -> Iterator[Pass]:
    """What is done with attention's output before its projection."""
    gated = config.attn_out_gate_enabled or config.sparse_attn_gate_enabled
    if config.excludes_self(layer):
        yield Pass(XSA, 2 * x + k, 3 * x + 2 * k + sum_dv)
    elif gated:
        yield Pass(XSA, 2 * x, 3 * x)
