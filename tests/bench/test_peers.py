"""The peers: what is taken from their checkouts, and what is left out with its reason."""

import pytest
import torch

from bench import peers
from bench.harness import measure as harness
from bench.peers import modded_nanogpt, parameter_golf


def test_a_peer_that_is_not_there_skips_with_the_reason(monkeypatch, tmp_path):
    def reason():
        with pytest.raises(pytest.skip.Exception) as caught:
            peers.peer("parameter_golf")
        return str(caught.value)

    monkeypatch.delenv("PGOLF_PEERS", raising=False)
    assert reason() == "peer openai/parameter-golf: PGOLF_PEERS names no folder with checkouts"
    monkeypatch.setenv("PGOLF_PEERS", str(tmp_path))
    assert reason() == "peer openai/parameter-golf: no checkout at PGOLF_PEERS/parameter-golf"
    (tmp_path / "parameter-golf").mkdir()
    assert "train_gpt.py" in reason()
    (tmp_path / "parameter-golf" / "train_gpt.py").write_text("def main(): pass\n")
    assert "defines no zeropower_via_newtonschulz5" in reason()


def test_a_peer_gives_its_functions_and_runs_nothing_else(monkeypatch, tmp_path):
    checkout = tmp_path / "parameter-golf"
    checkout.mkdir()
    script = (
        "raise SystemExit('ran')\ndef zeropower_via_newtonschulz5(G: Tensor, steps: int = 10):\n    return G * steps\n"
    )
    (checkout / "train_gpt.py").write_text(script)
    monkeypatch.setenv("PGOLF_PEERS", str(tmp_path))
    assert peers.peer("parameter_golf").zeropower_via_newtonschulz5(2, 3) == 6


SCRIPT = """
raise SystemExit("ran")
import nothing_like_it
SIZE = 3
OTHER = nothing_like_it.value

@triton.jit
def kernel(pointer, N: tl.constexpr):
    tl.store(pointer, N)

@torch.library.custom_op("pgolf_made_up_peer::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * SIZE

@scale.register_fake
def _(x):
    return x.new_empty(x.shape)

@scale.register_vmap
def _(info, dims, x):
    raise SystemExit("ran")

scale.register_autograd(lambda ctx, grad: grad * SIZE)

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return helper(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

def helper(x):
    return torch.ops.pgolf_made_up_peer.scale(x) - x

def unwanted():
    pass
"""


def test_kernels_classes_values_and_registrations_are_taken(tmp_path):
    triton = pytest.importorskip("triton")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    given = {"torch": torch, "triton": triton, "tl": triton.language}
    taken = peers.take(path, ["SIZE", "kernel", "scale", "Function", "helper"], given)
    assert set(vars(taken)) == {"SIZE", "kernel", "scale", "Function", "helper"}
    assert taken.SIZE == 3
    assert isinstance(taken.kernel, triton.runtime.jit.JITFunction)
    assert taken.kernel.src.startswith("def kernel(pointer, N: tl.constexpr):")

    x = torch.randn(4, requires_grad=True)
    assert torch.autograd.grad(taken.scale(x).sum(), x)[0].tolist() == [3.0] * 4
    compiled = torch.compile(taken.Function.apply, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * x)
    with pytest.raises(LookupError, match=r"script.py defines no absent"):
        peers.take(path, ["SIZE", "absent"], given)


def test_a_contender_that_is_not_there_costs_the_others_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PGOLF_PEERS", str(tmp_path))
    (tmp_path / "modded-nanogpt").mkdir()
    (tmp_path / "modded-nanogpt" / modded_nanogpt.KERNELS).write_text("CE_KERNEL_VOCAB_SIZE = 777\n")
    record = tmp_path / "parameter-golf" / parameter_golf.RECORD
    record.parent.mkdir(parents=True)
    record.write_text("class FusedLinearLeakyReLUSquareFunction:\n    apply = len\n")

    with pytest.warns(UserWarning, match="modded-nanogpt: its cross-entropy is compiled for 777 classes"):
        assert peers.contenders("softcapped_cross_entropy", "modded_nanogpt") == {}
    with pytest.warns(UserWarning, match=r"parameter-golf: train_gpt.py defines no linear_leaky_relu_square"):
        assert peers.contenders("leaky_relu2_mlp", "parameter_golf") == {}
    functions = ("linear_leaky_relu_square_kernel", "linear_leaky_relu_square")
    record.write_text(record.read_text() + "".join(f"def {name}(): pass\n" for name in functions))
    with pytest.warns(UserWarning, match="modded-nanogpt: .*no attribute"):
        found = peers.contenders("leaky_relu2_mlp", "modded_nanogpt", "parameter_golf")
    assert list(found) == ["parameter-golf"]
    assert found["parameter-golf"]([1, 2]) == 2


def test_a_peer_that_fails_or_differs_is_left_out():
    def broken(x):
        raise RuntimeError("no such device\nand more")

    found = {"same": lambda x: x + x, "twice off": lambda x: 4 * x, "broken": broken}
    with pytest.warns(UserWarning, match="is left out") as caught:
        kept = harness.able(lambda x: 2 * x, found, lambda: (torch.randn(5),), 1e-3)
    assert list(kept) == ["same"]
    assert [str(warning.message) for warning in caught] == [
        "peer twice off is left out: AssertionError: twice off differs by 1, accepted is 0.001",
        "peer broken is left out: RuntimeError: no such device",
    ]
