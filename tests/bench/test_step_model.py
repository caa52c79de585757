"""The model of a training step: what Inductor makes of it for a GPU that is not there, and what fusing would leave."""

import json
import math

import pytest

pytest.importorskip("triton")
pytest.importorskip("pydantic")
from bench.step_model import compiled_step, fused_glue, step_model
from bench.step_model import operations as step_operations
from bench.step_model import regions as step_regions
from bench.step_model import savings as step_savings
from pgolf.model import ModelConfig
from pgolf.model.execution import FUSABLE
from pgolf.settings import Settings

TOKENS, LENGTH, DIM, HEADS, KV_HEADS, HIDDEN, VOCAB = 8192, 1024, 256, 4, 2, 512, 512
X = TOKENS * DIM * 2
SETTINGS = Settings(
    vocab_size=VOCAB,
    num_layers=2,
    model_dim=DIM,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    mlp_slope=0.5,
    rope_dims=16,
    xsa_last_n=2,
    ln_scale=True,
    skip_gates_enabled=True,
    parallel_start_layer=1,
    sparse_attn_gate_enabled=True,
    smear_gate_enabled=True,
    loader="documents",
    train_batch_tokens=8 * TOKENS,
    train_seq_len=LENGTH,
    micro_batch_tokens=TOKENS,
    grad_clip_norm=0.3,
    ema_decay=0.99,
)
CONFIG = ModelConfig.of(SETTINGS)


@pytest.fixture(scope="module")
def kernels():
    """Of two layers with everything that the record has: a plain one with a skip's output, and one with two lanes."""
    return compiled_step.compiled_kernels(CONFIG, False, TOKENS, LENGTH, packed=True)


@pytest.fixture(scope="module")
def fused_kernels():
    return compiled_step.compiled_kernels(CONFIG, False, TOKENS, LENGTH, True, FUSABLE)


@pytest.fixture
def phases(kernels, fused_kernels, monkeypatch):
    def traced(function, jobs):
        assert function is compiled_step.compiled_kernels
        return [fused_kernels if job[5] else kernels for job in jobs]

    monkeypatch.setattr(step_model, "side_by_side", traced)
    return step_model.make_phases(SETTINGS, TOKENS, 8)


def test_flops_of_products_and_attention(phases):
    (phase,) = phases
    matrices = sum(math.prod(shape) for name, shape in CONFIG.shapes().items() if name.endswith("_bank"))
    scores = TOKENS * LENGTH // 2 * DIM
    for operations in (phase.plain, phase.fused):
        products = step_operations.totals(operations, ("matrix products", "MLP"))["flops"]
        assert 1 <= products / (6 * TOKENS * (matrices + VOCAB * DIM)) < 1.05  # a gate and padding may be a part
        assert step_operations.totals(operations, ("MLP",))["flops"] == 6 * TOKENS * 2 * 2 * DIM * HIDDEN
        assert step_operations.totals(operations, ("attention",))["flops"] == 2 * (2 + 5) * 2 * scores
    gates = step_operations.totals(phase.plain, step_regions.GLUE)["flops"]
    assert gates == 6 * TOKENS * 12 * (2 * HEADS + 1)


def test_bytes_of_known_kernels(kernels):
    def found(operation, backward, *shapes):
        mine = [k for k in kernels if k.operation == operation and k.backward == backward and k.shapes[:2] == shapes]
        assert mine
        return {kernel.bytes_moved for kernel in mine}

    square, kv = DIM * DIM * 2, KV_HEADS * 64 * DIM * 2
    assert found("aten.mm.out", False, (TOKENS, DIM), (DIM, DIM)) == {2 * X + square}
    assert found("aten.mm.out", False, (TOKENS, DIM), (DIM, KV_HEADS * 64)) == {X + X // 2 + kv}
    logits = TOKENS * VOCAB * 2
    loss = found("pgolf.softcapped_cross_entropy_gradient", True, (TOKENS, VOCAB), (TOKENS,))
    assert loss == {2 * logits + TOKENS * (8 + 4)}  # targets and scale; the losses, not used again, are left out
    saved_statistic = TOKENS * HEADS * 4
    attention = found("pgolf_bench.attention", False, (TOKENS, HEADS, 64), (TOKENS, KV_HEADS, 64))
    assert attention == {3 * X + saved_statistic + 4 * (TOKENS // LENGTH + 1)}

    # The first layer's residual add before the MLP: attention's output and x0, which the compiler keeps in float32 and
    # mixes once more, in; the stream and its norm out; a statistic of each norm, the mix's two rows.
    adds = [k.bytes_moved for k in kernels if not k.backward and step_regions.classify(k)[1] == fused_glue.ADD]
    assert adds == [5 * X + 2 * 4 * TOKENS + 2 * 2 * DIM]
    # The gain of q has a kernel of its own: what the compiler leaves to be won.
    copies = [
        k.bytes_moved
        for k in kernels
        if not k.backward and step_regions.functions(k) == {"cast", "qk_norm_rope_reference", "rows"}
    ]
    assert copies == [2 * X + 2 * HEADS] * 2 or copies == [2 * X + 4 * HEADS] * 2


def test_bytes_are_those_of_the_scheduler(kernels):
    generated = [kernel for kernel in kernels if not kernel.operation]
    assert len(generated) > 50
    for kernel in generated:
        if "rotate" not in step_regions.functions(kernel):  # of a head only the dimensions that turn are read
            assert kernel.bytes_moved == pytest.approx(kernel.scheduler_bytes, rel=0.02, abs=100_000)
    rotations = [k for k in generated if "rotate" in step_regions.functions(k) and not k.backward]
    assert sum(k.bytes_moved for k in rotations) < 0.9 * sum(k.scheduler_bytes for k in rotations)


def test_every_kernel_finds_its_place(phases):
    (phase,) = phases
    rows = {row["region"]: row for row in phase.regions()}
    sums = {fused_glue.SUM_X0, fused_glue.SUM_DY}  # of the plain step they are in other regions' kernels
    assert set(rows) >= set(fused_glue.REGIONS) - {fused_glue.SUM_DY}
    for region in set(fused_glue.REGIONS) - {fused_glue.MIX, *sums}:  # the first layer's mix is in the embedding's
        assert rows[region]["plain_forward_bytes"] > 0
        assert rows[region]["plain_backward_bytes"] > 0
    for side, operations in phase.sides().items():
        glue = step_operations.total_bytes(operations, step_regions.GLUE)
        other = step_operations.total_bytes([o for o in operations if o.region == step_regions.OTHER])
        assert other <= 0.02 * glue
        found = sum(row[f"{side}_{pass_}_bytes"] for row in rows.values() for pass_ in ("forward", "backward"))
        assert found == pytest.approx(glue)
        parts = sum(step_operations.total_bytes(operations, (part,)) for part in step_regions.CLASSES[:-1])
        assert parts == step_operations.total_bytes(operations)
    assert phase.ratio("least") < phase.ratio("fused") < 1
    assert phase.ratio("fused", step_regions.GLUE) < phase.ratio("fused")


def test_our_operations_are_counted(fused_kernels, phases):
    """Each in its region with the bytes of its contract."""

    def found(operation, backward, region):
        mine = [
            k
            for k in fused_kernels
            if k.operation.removesuffix("_backward") == f"pgolf.{operation}"
            and k.backward == backward
            and step_regions.classify(k) == (step_regions.GLUE[backward], region)
        ]
        assert mine
        return [kernel.bytes_moved / X for kernel in mine]

    few = 0.05  # parameters, logits of gates, rotary tables
    assert found("xsa_gate", False, fused_glue.XSA) == [pytest.approx(2.5, abs=few)] * 2
    assert found("xsa_gate", True, fused_glue.XSA) == [pytest.approx(4, abs=few)] * 2
    adds = found("residual_rms_norm", False, fused_glue.ADD)
    assert pytest.approx(4, abs=few) in adds  # x, branch -> x', y
    assert pytest.approx(3, abs=few) in found("residual_rms_norm", False, fused_glue.MIX)  # x0 is the stream -> m, y


@pytest.mark.parametrize(("one_product", "further"), [(False, 2), (True, 0)])
def test_least_bytes_by_hand(one_product, further):
    passes = fused_glue.fused_passes(CONFIG, False, TOKENS, one_product)
    table = VOCAB * DIM
    dv = 1.5  # two gradients of v become one
    heads = [(fused_glue.QK, 3, 4.5 + dv * one_product), (fused_glue.XSA, 2.5, 4 + dv * (not one_product))]
    assert [(p.region, p.forward_bytes / X, p.backward_bytes / X) for p in passes[1:]] == [
        (fused_glue.MIX, 3, 4),  # x0 -> m, y; dm, dy, x0 -> d x0
        *heads,
        (fused_glue.ADD, 4, 4),
        # x, branch, x0, skip -> both lanes, y, y'; both dlanes, dy, dy', u, x0, skip -> du, d x0, dskip
        (fused_glue.LANES, 8, 10),
        *heads,
        (fused_glue.LANES, 5, 9),
        (fused_glue.SUM_X0, 0, 2),
        (fused_glue.SUM_DY, 0, 2 * further),
    ]
    assert (passes[0].forward_bytes, passes[0].backward_bytes) == (X + 2 * table, X + 20 * table)


def kernel(operation="", backward=True, shapes=(), calls=(), **more):
    sources = frozenset(tuple(f"{name}.py:{name}" for name in names) for names in calls)
    return compiled_step.Kernel(operation, backward, X, X, shapes, sources, **more)


@pytest.mark.parametrize(
    ("found", "region"),
    [
        (kernel("pgolf.residual_rms_norm", shapes=((TOKENS, DIM),) * 2), fused_glue.ADD),
        (kernel("pgolf.residual_rms_norm", shapes=((TOKENS, DIM),) * 3 + ((2, DIM),)), fused_glue.MIX),
        (
            kernel("pgolf.residual_rms_norm", shapes=((TOKENS, DIM),), calls=[("merge_lanes", "residual_rms_norm")]),
            fused_glue.LANES,
        ),
        (
            kernel(
                "pgolf.residual_rms_norm",
                shapes=((TOKENS, DIM),) * 3 + ((3, DIM),),
                calls=[("forward", "_layers", "merge_lanes", "residual_rms_norm")],
            ),
            fused_glue.LANES,
        ),
        (kernel("pgolf.two_lane_rms_norm_backward"), fused_glue.LANES),
        (kernel("pgolf.embedding_smear_norm"), fused_glue.EMBED),
        (kernel("pgolf.qkv_norm_rope_backward"), fused_glue.QK),
        (
            kernel(only_sums=True, reads_of=("aten.mm.out",) * 3, calls=[("attention_branch", "gate_logits")]),
            fused_glue.SUM_DY,
        ),
        (kernel(reads_of=("pgolf.residual_rms_norm_backward",) * 5, calls=[("embed", "norm")]), fused_glue.SUM_X0),
        (
            kernel(only_sums=True, reads_of=("pgolf_bench.attention_backward", "pgolf.xsa_gate_backward")),
            fused_glue.XSA,
        ),
        (kernel(calls=[("attention_branch", "_anything", "exclude_self")]), fused_glue.XSA),
        (kernel(calls=[("forward", "_layers", "add_norm", "norm"), ("forward", "embed", "norm")]), fused_glue.ADD),
        (kernel(calls=[("forward", "embed")]), fused_glue.EMBED),
        (kernel(calls=[("forward", "something_new")]), step_regions.OTHER),
        (kernel("pgolf.something_new"), step_regions.OTHER),
    ],
)
def test_regions(found, region):
    assert step_regions.classify(found) == (step_regions.GLUE[1], region)


def test_products_of_mlp_and_others():
    shapes = ((TOKENS, DIM), (TOKENS, HIDDEN))
    inside = kernel("pgolf.weight_gradient", shapes=shapes, calls=[("mlp_branch", "leaky_relu2_mlp")])
    assert step_regions.classify(inside) == ("MLP", "")
    both = [("mlp_branch", "leaky_relu2_mlp"), ("attention_branch",)]
    output = kernel("aten.mm.out", shapes=((TOKENS, DIM), (DIM, DIM)), calls=both)
    assert step_regions.classify(output) == ("matrix products", "")
    assert step_regions.classify(kernel("pgolf.weight_gradient", shapes=shapes)) == ("matrix products", "")


def test_one_product_of_q_k_and_v_is_seen():
    width = DIM + 2 * KV_HEADS * 64 + 64  # a gate, and padding
    product = kernel("aten.mm.out", False, ((TOKENS, DIM), (DIM, width)))
    assert step_operations.has_one_product([product] * 2, CONFIG)
    assert not step_operations.has_one_product([product], CONFIG)  # the head may be as wide
    assert not step_operations.has_one_product([kernel("aten.mm.out", False, ((TOKENS, DIM), (DIM, DIM)))] * 2, CONFIG)


def test_what_is_not_built(phases):
    (phase,) = phases
    saved = {saving.name: saving for saving in phase.savings}
    weights = 2 * DIM * HIDDEN
    mlp, head = saved["MLP in chunks of tokens"], saved["head and loss in chunks"]
    # x, h | h, y; dy, h, dz | dz, dx | dz, x | dy, h with h = 2 X, instead of x, h, y and dy, h, x, dx.
    assert mlp.bytes_moved == pytest.approx(2 * (20 - 9) * X, abs=20 * weights)
    logits = TOKENS * VOCAB * 2
    assert head.bytes_moved == pytest.approx(6 * logits + X, rel=0.02)  # three products, three passes of the loss
    left = step_operations.total_bytes(phase.fused) - sum(saving.bytes_moved for saving in phase.savings)
    assert phase.unbuilt()["bytes"] == pytest.approx(left)
    matrices = step_operations.totals(phase.plain, ("matrix products", "attention", "MLP"))["flops"]
    assert phase.unbuilt()["h200_ms"] > 1e3 * matrices / step_model.PEAK_FLOPS


def test_chunks_of_the_mlp():
    record = ModelConfig.of(step_model.resolve("record", None, 8)[0])
    chunks = step_savings.mlp_chunks(record, True, 98_304)
    assert chunks.live_bytes <= step_savings.OURS * step_savings.L2_BYTES
    assert chunks.launches == 17 * 6 * math.ceil(98_304 / chunks.tokens)
    assert 0.9 < chunks.fill <= 1
    assert step_savings._fill(128, 128) == 4 / 132  # one tile, its sum over four blocks
    assert step_savings._fill(2048, 2048) == 128 / 132


def test_jobs_side_by_side():
    assert step_model.side_by_side(math.gcd, [(12, 18), (7, 5)]) == [6, 1]


def test_looped_layers_are_counted_each_time():
    settings = Settings(num_layers=5, num_loops=2, loop_start=1, loop_end=2, unet_skips=False)
    counts = [
        sum(p.region == fused_glue.QK for p in fused_glue.fused_passes(ModelConfig.of(settings), looping, TOKENS))
        for looping in (False, True)
    ]
    assert counts == [5, 9]


def test_elements_that_an_index_touches():
    sympy = pytest.importorskip("sympy")
    from torch._inductor.dependencies import MemoryDep

    row, column, anywhere = sympy.symbols("d0 d1 tmp0", integer=True)
    sizes = {"var_names": (row, column), "size": (sympy.Integer(10), sympy.Integer(8))}
    assert compiled_step._elements(MemoryDep("x", 64 * row + column, **sizes)) == 80  # 8 of 64 columns
    assert compiled_step._elements(MemoryDep("x", column, **sizes)) == 8  # one row for all
    assert compiled_step._elements(MemoryDep("x", 64 * anywhere + column, **sizes)) == 80  # a look-up


def test_what_travels(phases):
    sent = {o.name: o.bytes_moved for o in phases[0].plain if o.part == "communication"}
    weights = sum(math.prod(shape) for name, shape in CONFIG.shapes().items() if name.endswith("_bank"))
    scatter, gather, reduce = sent.values()
    assert scatter == 2 * gather
    assert 7 / 8 * 4 * weights <= scatter <= 2 * 4 * weights  # so few matrices do not share out evenly
    assert reduce == 7 / 8 * 2 * 4 * (CONFIG.parameters() - weights)
    alone = step_operations.optimiser_operations(CONFIG, SETTINGS, 1)
    assert not [o for o in alone if o.part == "communication"]


def test_steps_in_the_budget(phases):
    settings = SETTINGS.model_copy(update={"gptq_reserve_seconds": 0.0, "enable_looping_at": 0.25})
    both = [step_model.Phase(name, 1, [], [], []) for name in ("pre-loop", "loop")]
    assert step_model.steps_in_budget(both, settings, {"pre-loop": 100, "loop": 150}) == 1500 + 3000
    assert step_model.steps_in_budget(both[:1], settings, {"pre-loop": 100}) == 6000
    logged = settings.model_copy(update={"enable_looping_at": 0.35, "gptq_reserve_seconds": 0.5})
    steps = step_model.steps_in_budget(both, logged, step_model.MEASURED_MS["record"])
    assert steps == pytest.approx(4994, rel=0.002)  # the steps of #2135's log


def test_the_command(phases, monkeypatch, capsys):
    monkeypatch.setattr(step_model, "load_settings", lambda *_, **__: SETTINGS)
    assert step_model.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tokens"], answer["gpus"], list(answer["phases"])) == (TOKENS, 8, ["pre-loop"])
    phase = answer["phases"]["pre-loop"]
    for side in ("plain", "fused", "least"):
        assert set(phase[side]["classes"]) == set(step_regions.CLASSES)
        for device in ("h100", "h200"):
            parts = sum(part[f"{device}_ms"] for part in phase[side]["classes"].values())
            assert phase[side]["total"][f"{device}_ms"] == pytest.approx(parts)
            assert sum(o[f"{device}_ms"] for o in phase[side]["operations"]) == pytest.approx(parts)
    saved = [row["saved_bytes"] for row in phase["regions"]]
    assert saved == sorted(saved, reverse=True)
    ratio = phase["fused"]["total"]["bytes"] / phase["plain"]["total"]["bytes"]
    assert phase["bytes_ratio"]["fused"] == pytest.approx(ratio)
    assert phase["not_built"]["total"]["bytes_ratio"] < phase["bytes_ratio"]["least"]
    assert step_model.main(["--kernels"]) == 0
    report = capsys.readouterr().out
    assert "steps in 600 s" in report
    assert "With all of these" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100"], "must be a multiple of TRAIN_SEQ_LEN=2048"),
        (["--gpus", "0"], "must be at least 1"),
        (["--preset", "recrod"], "recrod"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step_model.main(arguments)
    assert message in capsys.readouterr().err.replace("\n", " ")
