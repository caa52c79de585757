"""Adding up xᵀ x: against float64, symmetric to the bit, in place, every dtype, empty input, registered."""

import pytest
import torch
from numerics import DTYPES, relative_error

from pgolf import ops
from pgolf.ops.accumulate_hessian import accumulate_hessian_reference


def exact(hessian, x):
    return accumulate_hessian_reference(hessian.double(), x.double())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 63), (100, 128), (5000, 300)])
@pytest.mark.usefixtures("poisoned")
def test_against_float64(shape, dtype):
    hessian, truth = torch.zeros(shape[-1], shape[-1]), torch.zeros(shape[-1], shape[-1], dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(shape).to(dtype)
        assert ops.accumulate_hessian(hessian, x) is hessian
        truth = exact(truth, x)
    assert relative_error(hessian, truth) < 1e-6, "low precision is multiplied exactly"
    assert torch.equal(hessian, hessian.mT)


def test_banks_views_and_empty_input():
    bank = torch.zeros(2, 150, 150)
    x = torch.randn(150, 40).t()
    ops.accumulate_hessian(bank[1], x[::2])
    assert torch.equal(bank[0], torch.zeros(150, 150))
    assert relative_error(bank[1], exact(torch.zeros(150, 150), x[::2])) < 1e-6
    kept = bank[1].clone()
    ops.accumulate_hessian(bank[1], torch.empty(0, 150))
    ops.accumulate_hessian(bank[1].mT, torch.empty(4, 0, 150, dtype=torch.bfloat16))
    assert torch.equal(bank[1], kept)
    ops.accumulate_hessian(torch.empty(0, 0), torch.empty(7, 0))
    with torch.inference_mode():
        ops.accumulate_hessian(torch.zeros(3, 3), torch.ones(2, 3))
    weight = torch.randn(4, 6, requires_grad=True)
    assert not ops.accumulate_hessian(torch.zeros(6, 6), weight).requires_grad


def test_it_feeds_gptq():
    x = torch.randn(500, 40) @ torch.randn(40, 40)
    hessian = ops.accumulate_hessian(torch.zeros(40, 40), x)
    assert torch.isfinite(ops.gptq(torch.randn(8, 40), hessian, 6)[1]).all()


@pytest.mark.parametrize(
    ("hessian", "x", "error", "message"),
    [
        (torch.zeros(3, 3).double(), torch.zeros(2, 3), TypeError, "hessian: dtype torch.float64"),
        (torch.zeros(3, 3), torch.zeros(2, 3).int(), TypeError, "x: dtype torch.int32"),
        (torch.zeros(3, 4), torch.zeros(2, 3), ValueError, r"hessian: shape \(3, 4\), expected \(3, 3\)"),
        (torch.zeros(3, 3), torch.tensor(1.0), ValueError, "x: a number"),
        (torch.zeros(3, 3), torch.zeros(2, 3, device="meta"), ValueError, "x: on meta"),
        (torch.zeros(3, 3), [1.0], TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(hessian, x, error, message):
    with pytest.raises(error, match=message):
        ops.accumulate_hessian(hessian, x)


def test_registration_and_one_graph():
    torch.library.opcheck(torch.ops.pgolf.accumulate_hessian.default, (torch.zeros(5, 5), torch.randn(7, 5)))
    compiled = torch.compile(ops.accumulate_hessian, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 5)
    assert torch.equal(compiled(torch.zeros(5, 5), x), ops.accumulate_hessian(torch.zeros(5, 5), x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(dtype):
    for shape in ((1, 1), (3, 5, 63), (5000, 300), (20_000, 512)):
        hessian, x = torch.zeros(shape[-1], shape[-1], device="cuda"), torch.randn(shape, device="cuda").to(dtype)
        for _ in range(2):
            ops.accumulate_hessian(hessian, x)
        assert torch.equal(hessian, hessian.mT)
        assert relative_error(hessian, 2 * exact(torch.zeros_like(hessian), x)) < 1e-5
    ops.accumulate_hessian(hessian, x[:0])
