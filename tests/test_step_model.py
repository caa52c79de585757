"""The model of a training step: what Inductor makes of it for a GPU that is not there, and what fusing would leave."""

import json
import math

import pytest

pytest.importorskip("triton")
pytest.importorskip("pydantic")
import compiled_step
import fused_glue
import step_model
import step_operations

from pgolf.model import ModelConfig
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


@pytest.fixture
def phases(kernels, monkeypatch):
    monkeypatch.setattr(step_operations, "compiled_kernels", lambda *_: kernels)
    return step_model.make_phases(SETTINGS, TOKENS, 8)


def test_flops_of_products_and_attention(phases):
    (phase,) = phases
    matrices = sum(math.prod(shape) for name, shape in CONFIG.shapes().items() if name.endswith("_bank"))
    products = step_model.totals(phase.compiled, ("matrix products", "MLP"))["flops"]
    assert products == 6 * TOKENS * (matrices + VOCAB * DIM)
    gates = step_model.totals(phase.compiled, step_operations.GLUE)["flops"]
    assert gates == 6 * TOKENS * 12 * (2 * HEADS + 1)
    scores = TOKENS * LENGTH // 2 * DIM
    assert step_model.totals(phase.compiled, ("attention",))["flops"] == 2 * (2 + 5) * 2 * scores


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
    adds = [k.bytes_moved for k in kernels if not k.backward and step_operations.classify(k)[1] == fused_glue.ADD]
    assert adds == [5 * X + 2 * 4 * TOKENS + 2 * 2 * DIM]
    # The gain of q has a kernel of its own: what the compiler leaves to be won.
    copies = [
        k.bytes_moved
        for k in kernels
        if not k.backward and step_operations.functions(k) == {"_attend", "_cast", "_norm_and_rotate", "_rows"}
    ]
    assert copies == [2 * X + 2 * HEADS] * 2 or copies == [2 * X + 4 * HEADS] * 2


def test_bytes_are_those_of_the_scheduler(kernels):
    generated = [kernel for kernel in kernels if not kernel.operation]
    assert len(generated) > 50
    for kernel in generated:
        if "rotate" not in step_operations.functions(kernel):  # of a head only the dimensions that turn are read
            assert kernel.bytes_moved == pytest.approx(kernel.scheduler_bytes, rel=0.02, abs=100_000)
    rotations = [k for k in generated if "rotate" in step_operations.functions(k) and not k.backward]
    assert sum(k.bytes_moved for k in rotations) < 0.9 * sum(k.scheduler_bytes for k in rotations)


def test_every_kernel_finds_its_place(phases):
    (phase,) = phases
    rows = {row["region"]: row for row in phase.regions()}
    assert set(rows) >= set(fused_glue.REGIONS)
    other = step_model.total_bytes([o for o in phase.compiled if o.region == step_operations.OTHER])
    assert other <= 0.02 * step_model.total_bytes(phase.compiled, step_operations.GLUE)
    for region in set(fused_glue.REGIONS) - {fused_glue.MIX}:  # the first layer's mix is in the embedding's kernel
        assert rows[region]["compiled_forward_bytes"] > 0
        assert rows[region]["compiled_backward_bytes"] > 0
    assert 0 < phase.glue_ratio < phase.bytes_ratio < 1
    parts = sum(step_model.total_bytes(phase.compiled, (part,)) for part in step_operations.CLASSES[:-1])
    assert parts == step_model.total_bytes(phase.compiled)


def test_fused_bytes_by_hand():
    passes = fused_glue.fused_passes(CONFIG, False, TOKENS)
    table = VOCAB * DIM
    assert [(p.region, p.forward_bytes / X, p.backward_bytes / X) for p in passes[1:]] == [
        (fused_glue.MIX, 3, 7),  # x0 -> m, y; dm, three dy, x0, d x0 -> d x0
        (fused_glue.QK, 3, 4.5),
        (fused_glue.XSA, 2.5, 5.5),
        (fused_glue.ADD, 4, 4),
        # x, branch, x0, skip -> both lanes, y, y'; both dlanes, three dy, dy', u, x0, skip, d x0 -> du, d x0, dskip
        (fused_glue.LANES, 8, 13),
        (fused_glue.QK, 3, 4.5),
        (fused_glue.XSA, 2.5, 5.5),
        (fused_glue.LANES, 5, 9),
    ]
    assert (passes[0].forward_bytes, passes[0].backward_bytes) == (X + 2 * table, X + 20 * table)


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
    sent = {o.name: o.bytes_moved for o in phases[0].compiled if o.part == "communication"}
    weights = sum(math.prod(shape) for name, shape in CONFIG.shapes().items() if name.endswith("_bank"))
    scatter, gather, reduce = sent.values()
    assert scatter == 2 * gather
    assert 7 / 8 * 4 * weights <= scatter <= 2 * 4 * weights  # so few matrices do not share out evenly
    assert reduce == 7 / 8 * 2 * 4 * (CONFIG.parameters() - weights)
    alone = step_operations.optimiser_operations(CONFIG, SETTINGS, 1)
    assert not [o for o in alone if o.part == "communication"]


def test_steps_in_the_budget(phases):
    settings = SETTINGS.model_copy(update={"gptq_reserve_seconds": 0.0, "enable_looping_at": 0.25})
    both = [step_model.Phase(name, 1, [], []) for name in ("pre-loop", "loop")]
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
    for side in ("compiled", "fused"):
        assert set(phase[side]["classes"]) == set(step_operations.CLASSES)
        for device in ("h100", "h200"):
            parts = sum(part[f"{device}_ms"] for part in phase[side]["classes"].values())
            assert phase[side]["total"][f"{device}_ms"] == pytest.approx(parts)
            assert sum(o[f"{device}_ms"] for o in phase[side]["operations"]) == pytest.approx(parts)
    saved = [row["saved_bytes"] for row in phase["regions"]]
    assert saved == sorted(saved, reverse=True)
    assert phase["bytes_ratio"] == pytest.approx(phase["fused"]["total"]["bytes"] / phase["compiled"]["total"]["bytes"])
    assert step_model.main(["--kernels"]) == 0
    assert "steps in 600 s" in capsys.readouterr().out


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
