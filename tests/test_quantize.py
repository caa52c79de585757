"""Quantisers by name, and the byte budget: equal slopes in a closed loop."""

import math
from typing import get_args

import pytest
import torch

from pgolf.artifact import read_artifact, write_artifact
from pgolf.data.batch import MicroBatch
from pgolf.distributed import Ranks
from pgolf.errors import UserError
from pgolf.model import Model, ModelConfig, role_of
from pgolf.quantize import model_from_artifact, quantize, quantize_to_size
from pgolf.quantizers import QUANTIZERS
from pgolf.rate_budget import CLIPS, MOST_CODINGS, Coded, choose_clips, fit, measure_rises
from pgolf.settings import Settings, load_settings

ALONE = Ranks(0, 1, torch.device("cpu"))


def proxy_loss(weight, approximation, hessian):
    """tr((W - Q) H (W - Q)ᵀ), over all matrices of a bank."""
    difference = (weight - approximation).detach().reshape(-1, *weight.shape[-2:])
    return ((difference @ hessian) * difference).sum().item()


@pytest.fixture(scope="module")
def tiny():
    """(model, Hessians, token rows, settings) of random weights."""
    torch.manual_seed(0)
    settings = load_settings(
        {"PRESET": "demo", "VOCAB_SIZE": "300", "MODEL_DIM": "64", "NUM_LAYERS": "1", "TRAIN_SEQ_LEN": "32"}
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
    return model, hessians, rows, settings


def test_settings_accept_exactly_the_quantizers_there_are():
    assert set(get_args(Settings.model_fields["quantizer"].annotation)) == set(QUANTIZERS)
    with pytest.raises(UserError, match="QUANTIZER=nearest"):
        load_settings({"PRESET": "demo", "QUANTIZER": "nearest"})
    with pytest.raises(UserError, match="ARTIFACT_BYTES=-1"):
        load_settings({"PRESET": "demo", "ARTIFACT_BYTES": "-1"})


def test_every_quantizer_makes_an_artifact_of_like_size(tiny, tmp_path):
    model, hessians, _, settings = tiny
    sizes, losses = {}, {}
    for name in QUANTIZERS:
        chosen = settings.model_copy(update={"quantizer": name})
        tensors = quantize(model, hessians, chosen)
        path = tmp_path / f"{name}.pgolf"
        sizes[name] = write_artifact(path, tensors, {"model": model.config.as_dict()}).total
        back = model_from_artifact(read_artifact(path), torch.float32, torch.device("cpu"))
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


def test_equal_slopes():
    clips = {"a": 12.0, "b": 12.0, "c": 20.0}
    counts = {"a": 1000, "b": 4000, "c": 2000}
    coded = Coded(5000, {"a": 500, "b": 2000, "c": 1500})
    rises = {"a": 3.0, "b": 8.0, "c": 0.5}
    new = choose_clips(clips, coded, counts, rises, wanted=3000.0)
    modelled = {n: coded.sizes[n] - counts[n] / 8 * math.log2(new[n] / clips[n]) for n in clips}
    assert sum(modelled.values()) == pytest.approx(3000, abs=0.01)
    assert all(CLIPS[0] <= each <= CLIPS[1] for each in new.values())
    slopes = {n: rises[n] * (new[n] / clips[n]) ** 2 / counts[n] for n in clips}
    assert slopes["a"] == pytest.approx(slopes["b"]) == pytest.approx(slopes["c"])
    for wanted, end in ((1e9, CLIPS[0]), (-1e9, CLIPS[1])):
        for each in choose_clips(clips, coded, counts, rises, wanted).values():
            assert each == pytest.approx(end)


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
    assert found.codings == len(calls) <= MOST_CODINGS
    assert 0.999 * target <= found.total <= target
    assert found.total == code(found.clips).total


def test_a_target_that_cannot_be_met():
    clips, counts = {"a": 12.85}, {"a": 100_000}
    code, _ = pretend(1.0)
    with pytest.raises(UserError, match="ARTIFACT_BYTES=2000: the smallest of"):
        fit(code, clips, counts, {"a": 1.0}, 2000)
    assert fit(code, clips, counts, {"a": 1.0}, 10**7).total < 10**7  # more than the finest step needs


def test_a_model_is_written_to_size(tiny, tmp_path):
    model, hessians, rows, settings = tiny
    before = [p.detach().clone() for p in model.parameters()]
    rises = measure_rises(model, hessians, rows, settings, ALONE)
    assert set(rises) == set(hessians)
    assert min(rises.values()) > 0
    for kept, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(kept, p)
    path, calls = tmp_path / "model.pgolf", []

    def write(tensors):
        calls.append(1)
        return write_artifact(path, tensors, {})

    plain = write(quantize(model, hessians, settings)).total
    for share in (0.8, 1.1):
        calls.clear()
        target = round(share * plain)
        found = quantize_to_size(model, hessians, settings.model_copy(update={"artifact_bytes": target}), rises, write)
        assert 0.999 * target <= found.total == path.stat().st_size <= target
        assert found.codings <= 4
        assert len(calls) <= found.codings + 1
