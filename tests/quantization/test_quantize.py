"""Quantisers by name, corrections of low rank, and models written to a size."""

import tracemalloc
from dataclasses import replace
from typing import get_args

import pytest
import torch

from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.artifact.corrections import add_corrections
from pgolf.artifact.model import load_weights, model_from_artifact
from pgolf.data.batch import MicroBatch
from pgolf.errors import ArtifactError, UserError
from pgolf.model import Execution, Model, ModelConfig, role_of
from pgolf.quantization.byte_budget import measure_rises
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
