"""Coordinate descent after GPTQ: never worse, a local optimum, the definition's result, edges, real matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import need

from pgolf import ops
from pgolf.ops import backends
from pgolf.ops.gptq_refine import LEAST_STEP

REAL = Path(__file__).parents[3] / "shared" / "data" / "weights"
BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request):
    need("gptq_refine", request.param)
    with ops.backend(request.param):
        yield request.param


def moments(count: int, n: int, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(count, 3 * n, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    return (x.mT @ x / (3 * n)).to(dtype)


def loss(weight, values, scale, hessian) -> torch.Tensor:
    """(w - q) H (w - q)ᵀ of each row in float64."""
    difference = weight.double() - values.double() * scale.double().unsqueeze(-1)
    return ((difference @ hessian.double()) * difference).sum(dim=-1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [2, 3, 6, 8])
@pytest.mark.parametrize("refits", [0, 3])
def test_no_row_gets_worse(bits, refits):
    for count, rows, n in ((1, 1, 1), (2, 33, 31), (1, 40, 100)):
        weight, hessian = torch.randn(count, rows, n), moments(count, n)
        values, scale = ops.gptq(weight, hessian, bits, clip_sigmas=3.0)
        kept = values.clone(), scale.clone()
        refined, fitted = ops.gptq_refine(weight, hessian, values, scale, bits, refits=refits)
        assert torch.equal(values, kept[0])
        assert torch.equal(scale, kept[1])
        assert refined.dtype == torch.int8
        assert refined.shape == values.shape
        assert fitted.dtype == torch.float16
        assert refined.abs().max() <= 2 ** (bits - 1) - 1
        if refits == 0:
            assert torch.equal(fitted, scale)
        before, after = loss(weight, values, scale, hessian), loss(weight, refined, fitted, hessian)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        if n == 100 and bits == 6:
            assert after.sum() < (0.995 if refits else 0.999) * before.sum()


@pytest.mark.usefixtures("backend")
def test_no_single_move_is_left():
    weight, hessian = torch.randn(20, 60), moments(1, 60)[0]
    values, scale = ops.gptq(weight, hessian, 5)
    values, scale = ops.gptq_refine(weight, hessian, values, scale, 5, sweeps=1000, refits=0)
    scale = scale.double().unsqueeze(1)
    pushed = (weight.double() - scale * values.double()) @ hessian.double()
    step = pushed / (hessian.diagonal().double() * scale)
    free = (values.double() + step.sign()).abs() <= 15
    assert step[free].abs().max() < LEAST_STEP + 1e-3


def test_rounding_to_nearest_gains_most():
    weight, hessian = torch.randn(30, 80), moments(1, 80)[0]
    scale = (4 * weight.std(dim=1) / 31).half()
    values = (weight / scale.float().unsqueeze(1)).round().clamp(-31, 31).to(torch.int8)
    refined, fitted = ops.gptq_refine(weight, hessian, values, scale, 6, sweeps=20)
    assert loss(weight, refined, fitted, hessian).sum() < 0.7 * loss(weight, values, scale, hessian).sum()


def test_a_wrong_scale_is_mended():
    weight = torch.randn(10, 50)
    values, scale = ops.gptq(weight, torch.eye(50), 6, clip_sigmas=4.0)
    refined, fitted = ops.gptq_refine(weight, torch.eye(50), values, scale * 1.5, 6, sweeps=0, refits=1)
    assert torch.equal(refined, values)
    best = (weight * values).sum(dim=1).double() / values.double().square().sum(dim=1)
    assert torch.equal(fitted, best.half())


@pytest.mark.parametrize("refits", [0, 2])
def test_native_is_the_definition(refits):
    need("gptq_refine", "native")
    native = backends.native()
    level, threads = native.level(), torch.get_num_threads()
    try:
        for count, rows, n in ((1, 1, 1), (3, 40, 65), (1, 70, 200)):
            weight, hessian = torch.randn(count, rows, n), moments(count, n)
            values, scale = ops.gptq(weight, hessian, 6, clip_sigmas=4.0)
            with ops.backend("reference"):
                expected, its_scale = ops.gptq_refine(weight, hessian, values, scale, 6, refits=refits)
            found = {}
            for name in native.levels():
                native.set_level(name)
                for count_of_threads in (1, 2, 4):
                    torch.set_num_threads(count_of_threads)
                    result = ops.gptq_refine(weight, hessian, values, scale, 6, refits=refits)
                    assert all(torch.equal(a, b) for a, b in zip(found.setdefault(name, result), result, strict=True))
                refined, fitted = found[name]
                # A row may go another way where a step lies within a rounding error of 0.501.
                same = (refined == expected).all(dim=-1)
                assert (~same).sum() <= max(1, 0.2 * count * rows)
                torch.testing.assert_close(fitted[same], its_scale[same], rtol=2e-3, atol=0)
                if rows > 1:
                    found_loss = loss(weight, refined, fitted, hessian).sum().item()
                    its_loss = loss(weight, expected, its_scale, hessian).sum().item()
                    assert found_loss == pytest.approx(its_loss, rel=0.01)
    finally:
        native.set_level(level)
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("backend")
def test_a_bank_gives_what_its_matrices_give():
    bank, hessians = torch.randn(3, 12, 40), moments(3, 40)
    values, scale = ops.gptq(bank, hessians, 6)
    refined, fitted = ops.gptq_refine(bank, hessians, values, scale, 6)
    for i in range(3):
        alone, its_scale = ops.gptq_refine(bank[i], hessians[i], values[i], scale[i], 6)
        assert (alone != refined[i]).float().mean() < 0.01  # PyTorch's product of a bank may round another way
        torch.testing.assert_close(its_scale, fitted[i], rtol=2e-3, atol=0)
    shared, _ = ops.gptq_refine(bank, hessians[0], values, scale, 6)
    assert (shared[0] != refined[0]).float().mean() < 0.01


@pytest.mark.usefixtures("backend")
def test_a_hessian_of_any_size_serves():
    weight, hessian = torch.randn(3, 9, 20), moments(3, 20)
    values, scale = ops.gptq(weight, hessian, 4, clip_sigmas=3.0)
    wanted, fitted = ops.gptq_refine(weight, hessian, values, scale, 4)
    for size in (2.0**70, 2.0**-70):
        found, its_scale = ops.gptq_refine(weight, hessian * size, values, scale, 4)
        assert torch.equal(found, wanted)
        assert torch.equal(its_scale, fitted)
    largest = hessian / hessian.abs().amax(dim=(1, 2), keepdim=True) * 3e38
    found, its_scale = ops.gptq_refine(weight, largest, values, scale, 4)
    assert (loss(weight, found, its_scale, hessian) <= 1.001 * loss(weight, values, scale, hessian)).all()
    found, _ = ops.gptq_refine(weight, hessian * 1e-41, values, scale, 4)
    assert found.int().abs().max() <= 7


@pytest.mark.usefixtures("backend")
def test_edges():
    weight, hessian = torch.randn(9, 12), moments(1, 12)[0]
    hessian[[0, 5]] = 0
    hessian[:, [0, 5]] = 0
    values, scale = ops.gptq(weight, hessian, 6)
    refined, _ = ops.gptq_refine(weight, hessian, values, scale, 6, refits=0)
    assert torch.equal(refined[:, [0, 5]], values[:, [0, 5]]), "dead columns stay"
    nothing, same = ops.gptq_refine(weight, torch.zeros(12, 12), values, scale, 6)
    assert torch.equal(nothing, values)
    assert torch.equal(same, scale)
    zeros = torch.zeros_like(values)
    grown, _ = ops.gptq_refine(weight, hessian, zeros, scale, 6)
    assert loss(weight, grown, scale, hessian).sum() < loss(weight, zeros, scale, hessian).sum()
    for shape in ((0, 5), (3, 0), (2, 0, 5)):
        empty = torch.zeros(shape, dtype=torch.int8), torch.ones(shape[:-1], dtype=torch.float16)
        found, _ = ops.gptq_refine(torch.zeros(shape), torch.eye(shape[-1]), *empty, 6)
        assert found.shape == shape


def test_float64_is_the_definitions():
    weight, hessian = torch.randn(8, 20, dtype=torch.float64), moments(1, 20, torch.float64)[0]
    values, scale = ops.gptq(weight, hessian, 6)
    refined, fitted = ops.gptq_refine(weight, hessian, values, scale, 6)
    assert loss(weight, refined, fitted, hessian).sum() <= loss(weight, values, scale, hessian).sum()


W, H, V, S = torch.ones(3, 4), torch.eye(4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3, dtype=torch.float16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((W * torch.nan, H, V, S, 6), {}, ValueError, "weight: matrix 0 holds NaN or infinity"),
        ((W, H * torch.inf, V, S, 6), {}, ValueError, "hessian: matrix 0 holds NaN or infinity"),
        ((W, -H, V, S, 6), {}, ValueError, "hessian: matrix 0 has a negative number on its diagonal"),
        ((W, H, V * 32, S, 6), {}, ValueError, r"values: 32 is outside -31\.\.31"),
        ((W, H, V, S * 0, 6), {}, ValueError, "scale: every one must be positive"),
        ((W, H, V, S.float(), 6), {}, TypeError, "scale: dtype torch.float32"),
        ((W, H, V.int(), S, 6), {}, TypeError, "values: dtype torch.int32"),
        ((W, H, V[:2], S, 6), {}, ValueError, r"values: shape \(2, 4\)"),
        ((W, H, V, S[:2], 6), {}, ValueError, r"scale: shape \(2,\)"),
        ((W, torch.eye(3), V, S, 6), {}, ValueError, r"hessian: shape \(3, 3\), expected \(4, 4\)"),
        ((W[0], H, V[0], S[:1], 6), {}, ValueError, r"weight: shape \(4,\)"),
        ((W, H, V, S, 9), {}, ValueError, "bits: 9"),
        ((W, H, V, S, 6), {"sweeps": -1}, ValueError, "sweeps: -1"),
        ((W, H, V, S, 6), {"refits": 0.5}, TypeError, "refits: expected an int"),
    ],
)
def test_wrong_arguments_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.gptq_refine(*arguments, **keywords)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real weights in ../shared/data/weights")
@pytest.mark.parametrize(
    ("name", "without_refit", "with_refit"),  # loss over GPTQ's, as others measured it
    [
        ("mlp.fc", 0.9504, 0.9279),
        ("mlp.proj", 0.9946, 0.982),
        ("attn.proj", 0.9552, 0.9388),
        ("attn.c_q", 0.9502, 0.9269),
    ],
)
def test_real_matrices_gain_what_others_measured(name, without_refit, with_refit):
    weight = torch.from_numpy(np.load(REAL / f"W_blocks.3.{name}.npy"))
    hessian = torch.from_numpy(np.load(REAL / f"H_blocks.3.{name}.npy"))
    values, scale = ops.gptq(weight, hessian, 6)
    before = loss(weight, values, scale, hessian).sum().item()
    for refits, expected in ((0, without_refit), (3, with_refit)):
        found = loss(weight, *ops.gptq_refine(weight, hessian, values, scale, 6, 20, refits), hessian).sum().item()
        assert found / before == pytest.approx(expected, abs=2e-3)
