"""Quantisers by name, and the byte budget: equal slopes in a closed loop."""

import bisect
import math
import random
import tracemalloc
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st

from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.artifact.corrections import add_corrections
from pgolf.artifact.model import load_weights, model_from_artifact
from pgolf.data.batch import MicroBatch
from pgolf.errors import ArtifactError, UserError
from pgolf.model import Execution, Model, ModelConfig, role_of
from pgolf.quantization.byte_budget import (
    CLIPS,
    LAST_MOVE,
    MOST_CODINGS,
    MOST_SHRINKINGS,
    Coded,
    Rate,
    choose_clips,
    correct_clips,
    fit,
    measure_rises,
)
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.low_rank import corrections
from pgolf.quantization.quantize import quantize, quantize_to_size, quantize_within_budget
from pgolf.quantization.quantizers import QUANTIZERS
from pgolf.quantization.size import CONTAINER_BYTES, projected_bytes
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings, load_settings

ALONE = Ranks(0, 1, torch.device("cpu"))


def proxy_loss(weight, approximation, hessian):
    """tr((W - Q) H (W - Q)ᵀ), over all matrices of a bank."""
    difference = (weight - approximation).detach().reshape(-1, *weight.shape[-2:])
    return ((difference @ hessian) * difference).sum().item()


@pytest.fixture(scope="module")
def tiny():
    """(model, Hessians, token rows, quantization config) of random weights."""
    torch.manual_seed(0)
    settings = load_settings(
        {
            "PRESET": "demo",
            "VOCAB_SIZE": "300",
            "MODEL_DIM": "64",
            "NUM_LAYERS": "1",
            "TRAIN_SEQ_LEN": "32",
            "PARALLEL_START_LAYER": "0",
        }
        | {"TRAIN_BATCH_TOKENS": "512", "MICRO_BATCH_TOKENS": "512"}
    )
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(0))
    hessians = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if role_of(name) != "control":
                parameter.add_(torch.randn(parameter.shape) * 0.1)
                count, n = len(parameter) if parameter.ndim == 3 else 1, parameter.shape[-1]
                x = torch.randn(count, 2 * n, n) * (torch.rand(n) + 0.2)
                hessians[name] = x.mT @ x
    rows = [MicroBatch(torch.randint(300, (16, 31)), torch.randint(300, (16, 31))) for _ in range(2)]
    return model, hessians, rows, QuantizationConfig.of(settings)


def test_settings_accept_exactly_the_quantizers_there_are():
    assert set(get_args(Settings.model_fields["quantizer"].annotation)) == set(QUANTIZERS)
    with pytest.raises(UserError, match="QUANTIZER=nearest"):
        load_settings({"PRESET": "demo", "QUANTIZER": "nearest"})
    with pytest.raises(UserError, match="ARTIFACT_BYTES=-1"):
        load_settings({"PRESET": "demo", "ARTIFACT_BYTES": "-1"})


def test_every_quantizer_makes_an_artifact_of_like_size(tiny, tmp_path):
    model, hessians, _, config = tiny
    sizes, losses = {}, {}
    for name in QUANTIZERS:
        chosen = replace(config, quantizer=name)
        tensors = quantize(model, hessians, chosen)
        path = tmp_path / f"{name}.pgolf"
        sizes[name] = write_artifact(path, tensors, {"model": model.config.as_dict()}).total
        back = model_from_artifact(read_artifact(path), Execution(), torch.device("cpu"))
        parameters = dict(back.named_parameters())
        losses[name] = sum(
            proxy_loss(p, parameters[which], hessians[which])
            for which, p in model.named_parameters()
            if which in hessians
        )
        for tensor in tensors:
            assert torch.equal(parameters[tensor.name], tensor.dequantize())
    assert max(sizes.values()) < 1.04 * min(sizes.values())  # trellises of small matrices pay for their columns' order
    assert losses["trellis"] < 0.92 * losses["gptq"] < 0.92 * losses["rtn"]


def test_low_rank_corrections(tiny, tmp_path):
    model, hessians, _, config = tiny
    losses = {}
    for rank, top_k in ((0, 3), (4, 3), (4, 1), (8, 100), (64, 100)):
        chosen = replace(config, quantizer="rtn", lqer_rank=rank, lqer_top_k=top_k)
        tensors = quantize(model, hessians, chosen)
        matrices = sum(len(p) if p.ndim == 3 else 1 for name, p in model.named_parameters() if name in hessians)
        assert len(tensors) - len(model.config.shapes()) == 2 * min(top_k, matrices) * (rank > 0)
        path = tmp_path / "lqer.pgolf"
        write_artifact(path, tensors, {"model": model.config.as_dict()})
        back = dict(model_from_artifact(read_artifact(path), Execution(), torch.device("cpu")).named_parameters())
        losses[rank, top_k] = sum(
            proxy_loss(p, back[name], hessians[name]) for name, p in model.named_parameters() if name in hessians
        )
    assert losses[0, 3] > losses[4, 1] > losses[4, 3] > losses[8, 100] > 10 * losses[64, 100]


def test_the_correction_is_the_best_of_its_rank():
    torch.manual_seed(0)
    settings = load_settings({"PRESET": "demo", "LQER_RANK": "3", "LQER_FACTOR_BITS": "8", "LQER_TOP_K": "1"})
    weight = torch.randn(40, 24)
    x = torch.randn(100, 24) * torch.logspace(0, 1.5, 24)
    hessian = (x.mT @ x)[None]
    nothing = StoredTensor("w", "mlp", (40, 24), torch.zeros(40, 24, dtype=torch.int8), torch.ones(40).half(), 6)
    left, right = corrections({"w": weight}, [nothing], {"w": hessian}, QuantizationConfig.of(settings))
    found = {"w": torch.zeros(40, 24)}
    add_corrections(found, {each.name: each for each in (left, right)})
    # by the theorem of Eckart and Young, what is left are the other singular values of W C
    root = torch.linalg.cholesky(hessian[0].double() + 0.01 * hessian[0].diagonal().mean() * torch.eye(24))
    least = torch.linalg.svdvals(weight.double() @ root)[3:].square().sum()
    assert least * (1 - 1e-6) < ((weight - found["w"]).double() @ root).square().sum() < 1.01 * least


def test_factors_that_do_not_fit(tiny):
    model, hessians, _, config = tiny
    chosen = replace(config, lqer_rank=2, lqer_top_k=1)
    tensors = quantize(model, hessians, chosen)
    good, left, right = tensors[:-2], *tensors[-2:]
    other = Model(model.config)
    load_weights(other, tensors)
    of = left.name.rsplit(".", 2)[0]
    for bad, message in (
        ([left], "right is missing"),
        ([replace(left, name="q_gain.0.left"), replace(right, name="q_gain.0.right")], "do not correct matrix 0"),
        ([replace(left, name="nothing.0.left"), right], "corrects no matrix"),
        ([replace(left, name=f"{of}.99.left"), replace(right, name=f"{of}.99.right")], "do not correct matrix 99"),
        ([right, replace(left, values=left.values[:1], scale=left.scale[:1], shape=(1, left.shape[1]))], "do not corr"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_weights(other, [*good, *bad])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1700},
        {"num_layers": 10**6},
        {"num_layers": 10**9, "xsa_last_n": 0},
        {"model_dim": 2**16},
        {"model_dim": 2**40},
        {"num_heads": 1, "num_kv_heads": 1, "model_dim": 2**62},
        {"bigram_vocab_size": 2**31},
        {"bigram_vocab_size": 2, "bigram_dim": 2**60},
        {"ve_layers": "0", "ve_dim": 2**30},
        {"mlp_mult": 1e15},
        {"vocab_size": 2**31},
    ],
    ids=str,
)
def test_a_described_model_is_compared_with_the_file_before_it_is_built(tiny, tmp_path, monkeypatch, changes):
    model, hessians, _, config = tiny
    path = tmp_path / "model.pgolf"
    stored = quantize(model, hessians, replace(config, quantizer="rtn"))
    write_artifact(path, stored, {"model": {**model.config.as_dict(), **changes}}, mode="static")
    artifact = read_artifact(path)
    monkeypatch.setattr("pgolf.artifact.model.Model", None)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as caught:
            model_from_artifact(artifact, Execution(), torch.device("cpu"))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tiny):
    model, hessians, _, config = tiny
    stored = quantize(model, hessians, replace(config, quantizer="rtn"))
    huge = torch.full((1, 64), 3e38)
    factors = [StoredTensor(f"qo_bank.1.{side}", "attention", (1, 64), huge, None, 32) for side in ("left", "right")]
    with pytest.raises(ArtifactError, match="the weights of qo_bank are not finite"):
        load_weights(Model(model.config), [*stored, *factors])


def test_bits_and_steps_by_role(tiny):
    model, hessians, _, config = tiny
    chosen = replace(
        config,
        quantizer="rtn",
        bits={**config.bits, "mlp": 4, "attention": 7},
        clip_sigmas={**config.clip_sigmas, "mlp": 3.0},
    )
    stored = {tensor.name: tensor for tensor in quantize(model, hessians, chosen)}
    bits = [stored[bank].bits for bank in ("up_bank", "qo_bank", "embedding")]
    assert bits == [4, 7, config.bits["embedding"]]
    expected = 3.0 * model.up_bank.std(dim=-1) / 7
    torch.testing.assert_close(stored["up_bank"].scale.float(), expected.detach(), rtol=0.02, atol=0)
    with pytest.raises(UserError, match="MLP_BITS=1 must be 2 to 8, or 0"):
        load_settings({"PRESET": "demo", "MLP_BITS": "1"})


def rates_of(clips, counts, sizes):
    rates = {name: Rate(count) for name, count in counts.items()}
    for name, rate in rates.items():
        rate.learn(clips[name], sizes[name])
    return rates


def test_equal_slopes():
    clips = {"a": 12.0, "b": 12.0, "c": 20.0}
    counts = {"a": 1000, "b": 4000, "c": 2000}
    sizes = {"a": 500, "b": 2000, "c": 1500}
    rises = {"a": 3.0, "b": 8.0, "c": 0.5}
    rates = rates_of(clips, counts, sizes)
    new = choose_clips(clips, rates, rises, wanted=3000.0)
    modelled = {}
    for n in clips:  # ½ log2(1 + s²) bits, s falling as k grows
        square = (4 ** (8 * sizes[n] / counts[n]) - 1) * (clips[n] / new[n]) ** 2
        modelled[n] = counts[n] / 8 * 0.5 * math.log2(1 + square)
        assert modelled[n] == pytest.approx(sizes[n] - counts[n] / 8 * math.log2(new[n] / clips[n]), rel=0.01)
    assert sum(modelled.values()) == pytest.approx(3000, abs=0.01)
    assert all(CLIPS[0] <= each <= CLIPS[1] for each in new.values())
    slopes = {n: rises[n] * (new[n] / clips[n]) ** 2 / counts[n] for n in clips}
    assert slopes["a"] == pytest.approx(slopes["b"]) == pytest.approx(slopes["c"])
    for wanted, end in ((1e9, CLIPS[0]), (-1e9, CLIPS[1])):
        for each in choose_clips(clips, rates, rises, wanted).values():
            assert each == pytest.approx(end)


def test_a_rate_goes_through_all_codings():
    rate = Rate(8000)
    rate.learn(16.0, 3000)
    assert rate.bytes_at(2) == pytest.approx(5000, rel=0.01)  # 1 bit for each halving
    assert rate.doubt == 0
    rate.learn(4.0, 6500)
    assert rate.bytes_at(4) == pytest.approx(3000)
    assert rate.bytes_at(2) == pytest.approx(6500)
    found = [rate.bytes_at(2 + i / 10) for i in range(50)]
    assert found == sorted(found, reverse=True)
    assert rate.doubt == pytest.approx((6500 - 5000) / 2, rel=0.02)
    flat = Rate(8000)
    flat.learn(16.0, 3000)
    flat.learn(32.0, 3000)
    assert flat.bytes_at(7) < 3000 < flat.bytes_at(3)  # never quite level: a wrong guess must lead out of it


def test_the_last_coding_moves_what_is_well_known():
    clips = {"a": 12.0, "b": 12.0}
    rates = rates_of(clips, {"a": 8000, "b": 8000}, {"a": 3000, "b": 3000})
    rates["a"].doubt = 300.0
    new = correct_clips(clips, rates, 30.0, 5900.0)
    assert math.log2(new["a"] / 12) == pytest.approx(math.log2(new["b"] / 12) / 101)
    assert sum(rate.bytes_at(math.log2(new[name])) for name, rate in rates.items()) == pytest.approx(5900)
    far = correct_clips(clips, rates, 30.0, 5200.0)  # `b` alone cannot
    assert far["b"] == pytest.approx(12 * 2**LAST_MOVE)
    assert sum(rate.bytes_at(math.log2(far[name])) for name, rate in rates.items()) == pytest.approx(5200)


def pretend(exponent, excess=1.0):
    """A coder whose bytes follow the steps otherwise than modelled; (code, the clips of each call)."""
    calls = []

    def code(clips):
        calls.append(clips)
        sizes = {n: round(excess * 1e5 * max(0.3, 3.3 - exponent * math.log2(k / 12.85)) / 8) for n, k in clips.items()}
        return Coded(sum(sizes.values()) + 1234, sizes)

    return code, calls


@pytest.mark.parametrize("exponent", [0.8, 0.95, 1.0, 1.2])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, 1.15, 1.3])
def test_the_loop_hits_its_target_in_four_codings(exponent, share):
    clips, counts = {"a": 12.85, "b": 12.85}, {"a": 100_000, "b": 100_000}
    code, calls = pretend(exponent)
    target = round(share * code(clips).total)
    calls.clear()
    found = fit(code, clips, counts, {"a": 1.0, "b": 3.0}, target)
    assert found.codings == len(calls) <= 4
    assert 0.999 * target <= found.total <= target
    assert found.total == code(found.clips).total


def bits_of_a_part(choose, harsh):
    """A made-up tensor's bits a weight by log2 k. Harsh: with a kink, a floor and a top."""
    bits, exponent, start = choose.uniform(2, 5), choose.uniform(0.9, 1.1), math.log2(12.85)
    kink, beyond = choose.uniform(2.2, 6.5), choose.choice([1.0, 0.6, 1.5]) if harsh else 1.0
    least, most = (choose.choice([0.0, 0.1, 0.3]), choose.choice([99.0, 4.5, 6.0])) if harsh else (0.0, 99.0)

    def bits_at(log_k):
        inside = min(log_k, kink) if kink > start else max(log_k, kink)
        y = bits - exponent * (inside - start + beyond * (log_k - inside))
        return min(max(0.5 * math.log2(1 + 4**y), least), most)

    return bits_at


def fit_made_up(seed, harsh):
    """(Fit, target) of a made-up coder: fixed bytes, noise of 0.1%, rises 400 times apart; None if out of reach."""
    choose = random.Random(seed)
    names = "abcdef"[: choose.randint(2, 6)]
    parts = {name: bits_of_a_part(choose, harsh) for name in names}
    counts = {name: choose.randint(4_000, 400_000) for name in names}
    rises = {name: count * 20 ** choose.uniform(-1, 1) for name, count in counts.items()}
    clips = {name: choose.choice([12.85, 20.0]) for name in names}
    fixed, noise, codings = choose.randint(0, sum(counts.values()) // 16), choose.choice([0.0, 5e-4]), []

    def code(clips):
        codings.append(clips)
        sizes = {}
        for name, k in clips.items():
            error = random.Random(f"{seed} {name} {k}").uniform(-noise, noise)
            sizes[name] = round(counts[name] / 8 * parts[name](math.log2(k)) * (1 + error))
        return Coded(fixed + sum(sizes.values()), sizes)

    smallest, largest = (code(dict.fromkeys(names, end)).total for end in reversed(CLIPS))
    target = round(choose.uniform(0.6, 1.3) * code(clips).total)
    if not 1.01 * smallest < target < 0.99 * largest:
        return None
    codings.clear()
    found = fit(code, clips, counts, rises, target)
    assert found.codings == len(codings) <= (MOST_CODINGS + MOST_SHRINKINGS + 1 if harsh else MOST_CODINGS)
    assert found.total == code(found.clips).total <= target
    assert found.fits
    return found, target


@settings_of_test(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_four_codings_reach_the_band(seed):
    fitted = fit_made_up(seed, harsh=False)
    assume(fitted)
    found, target = fitted
    assert 0.995 * target <= found.total <= target


def test_four_codings_mostly_reach_the_band_with_a_coder_of_kinks():
    first = random.SystemRandom().randrange(1 << 32)
    print(f"from seed {first}")
    fitted = [each for each in (fit_made_up(first + i, harsh=True) for i in range(400)) if each]
    reached = sum(found.codings <= MOST_CODINGS and found.total >= 0.995 * target for found, target in fitted)
    assert reached >= 0.95 * len(fitted)  # 98 in 100 do; 88 of a loop with one factor for what was missed


@settings_of_test(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_no_file_is_over_a_target_that_the_largest_steps_meet(seed):
    """A coder as bad as can be: sizes fall by jumps, anywhere, or hardly at all, with noise of up to 3%."""
    choose = random.Random(seed)
    noise = choose.choice([0.0, 1e-3, 0.03])
    counts = {name: choose.randint(100, 400_000) for name in "abcdef"[: choose.randint(1, 6)]}
    jumps = {name: sorted(choose.uniform(1.5, 9.0) for _ in range(choose.randint(0, 6))) for name in counts}
    slopes = {name: choose.choice([0.0, 0.01, 0.5, 1.0, 3.0]) for name in counts}

    def code(clips):
        sizes = {}
        for name, k in clips.items():
            bits = 8 / 2 ** (bisect.bisect(jumps[name], math.log2(k)) + slopes[name] * (math.log2(k) - 2))
            error = random.Random(f"{seed} {name} {k:.9g}").uniform(-noise, noise)
            sizes[name] = round(counts[name] / 8 * bits * (1 + error))
        return Coded(500 + sum(sizes.values()), sizes)

    clips = {name: choose.choice([3.0, 12.85, 20.0, 380.0, 500.0]) for name in counts}
    ends = code(clips).total, code({name: max(k, CLIPS[1]) for name, k in clips.items()}).total
    target = round(min(ends) + choose.choice([0.0, 1e-3, 0.1, 0.5, 0.9]) * abs(ends[0] - ends[1]))
    found = fit(code, clips, counts, {name: choose.uniform(0, 100) for name in counts}, target)
    assert found.fits
    assert found.total == code(found.clips).total <= target
    assert found.codings <= MOST_CODINGS + MOST_SHRINKINGS + 1


def test_a_target_that_cannot_be_met():
    clips, counts = {"a": 12.85}, {"a": 100_000}
    code, _ = pretend(1.0)
    found = fit(code, clips, counts, {"a": 1.0}, 2000)
    assert not found.fits
    assert found.total == code({"a": CLIPS[1]}).total  # the least that can be had
    assert fit(code, clips, counts, {"a": 1.0}, 10**7).total < 10**7  # more than the finest step needs


def test_a_model_is_written_to_size(tiny, tmp_path):
    model, hessians, rows, config = tiny
    before = [p.detach().clone() for p in model.parameters()]
    rises = measure_rises(model, hessians, rows, config, ALONE)
    assert set(rises) == set(hessians)
    assert min(rises.values()) > 0
    for kept, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(kept, p)
    path, calls = tmp_path / "model.pgolf", []

    def write(tensors):
        calls.append(1)
        return write_artifact(path, tensors, {})

    plain = write(quantize(model, hessians, config)).total
    for share in (0.8, 1.1):
        calls.clear()
        target = round(share * plain)
        found, cost = quantize_to_size(model, hessians, config, rises, write, target)
        assert cost.startswith(f"steps x{1 if share < 1 else 0}.")
        assert "nats a token by the model" in cost
        assert 0.999 * target <= found.total == path.stat().st_size <= target
        assert found.codings <= 4
        assert len(calls) <= found.codings + 1


def test_a_file_over_budget_is_made_to_fit_without_rises_too(tiny, tmp_path):
    model, hessians, _, config = tiny
    path = tmp_path / "model.pgolf"

    def write(tensors):
        return write_artifact(path, tensors, {}, mode="static")

    plain, code = write(quantize(model, hessians, config)).total, 5000

    def within(budget_bytes, wanted=0):
        return quantize_within_budget(model, hessians, config, {}, write, budget_bytes, code, wanted)

    assert within(plain + code) is None
    assert path.stat().st_size == plain
    tight = round(0.9 * plain) + code
    line = within(tight)
    assert 0.999 * (tight - code) <= path.stat().st_size <= tight - code
    assert f"{plain + code - tight} bytes over budget at the settings' steps; steps x1." in line
    assert "loss not measured" in line
    assert "smallest achievable size" in within(1000 + code)
    assert 1000 < path.stat().st_size < 0.5 * plain
    line = within(tight, wanted=2 * plain)
    assert 0.999 * (tight - code) <= path.stat().st_size <= tight - code
    assert f"ARTIFACT_BYTES={2 * plain} leaves too little for 5000 bytes of code; steps x1." in line
    assert "the code alone takes 5000 of 5000" in within(code)
    assert path.stat().st_size == plain


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_projection_is_within_one_per_cent(tiny, tmp_path, quantizer):
    model, hessians, _, config = tiny
    chosen = replace(config, quantizer=quantizer)
    count = write_artifact(tmp_path / "model.pgolf", quantize(model, hessians, chosen), {})
    found = projected_bytes(model.named_parameters(), chosen)
    container = CONTAINER_BYTES - count.container  # a run's metadata is longer
    assert abs((sum(found.values()) - container) / count.total - 1) < 0.01
    assert set(found) == set(count.roles) | {"container"}
