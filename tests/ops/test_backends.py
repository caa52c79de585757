"""Choice of a backend: forced by context or environment, unavailable ones explained, fallbacks on CUDA told once."""

import warnings

import pytest
import torch

from pgolf import ops
from pgolf.ops import backends


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch):
    monkeypatch.delenv("PGOLF_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_used", {})
    monkeypatch.setattr(backends, "_fallbacks", [])
    monkeypatch.setattr(backends, "_devices", dict(backends._devices))


@pytest.fixture
def _no_native(monkeypatch):
    def missing():
        return backends.Availability(False, "pgolf._native is not built", "build it with: pip install -e .")

    monkeypatch.setattr(backends, "_native_cpu", missing)


def pack():
    return ops.pack_bits(torch.tensor([1, -2, 3], dtype=torch.int8), 4)


def test_available_names_every_operation_and_backend():
    table = ops.available()
    assert set(table) == {
        "embedding_smear_norm", "gptq", "gptq_refine", "leaky_relu2_mlp", "linear_softcapped_cross_entropy",
        "newton_schulz", "pack_bits", "qk_norm_rope", "qkv_norm_rope", "residual_rms_norm", "softcapped_cross_entropy",
        "trellis_dequantize", "trellis_quantize", "two_lane_rms_norm", "unpack_bits", "unpack_dequantize", "xsa_gate",
    }  # fmt: skip
    for op, row in table.items():
        assert tuple(row) == ops.BACKENDS
        assert row["reference"].ok
        for name, found in row.items():
            assert isinstance(found, ops.Availability)
            assert found.ok or found.reason, f"{op} {name} gives no reason"
    assert table["newton_schulz"]["native"] == ops.Availability(False, "newton_schulz has no native kernel", "")
    triton = table["unpack_dequantize"]["triton"]
    assert triton.ok or triton.mend


def test_forcing_nests_and_is_restored_after_an_error():
    with ops.backend("reference"):
        assert backends.choose("pack_bits", "cpu") == "reference"
        with pytest.raises(KeyError), ops.backend("native"):
            raise KeyError
        assert backends.choose("pack_bits", "cpu") == "reference"
        with ops.backend("reference"):
            pass
        assert ops.used() == {"pack_bits": "reference"}
    assert backends._forced is None


def test_the_environment_forces_and_a_context_goes_before_it(monkeypatch):
    monkeypatch.setenv("PGOLF_BACKEND", "reference")
    pack()
    assert ops.used()["pack_bits"] == "reference"
    with pytest.raises(ops.BackendUnavailable), ops.backend("triton"):
        pack()
    monkeypatch.setenv("PGOLF_BACKEND", "")
    assert backends.choose("newton_schulz", "cpu") == "reference"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cuda'; accepted are reference, native, triton"):
        ops.backend("cuda").__enter__()
    monkeypatch.setenv("PGOLF_BACKEND", "fast")
    with pytest.raises(ValueError, match="PGOLF_BACKEND=fast: no such backend; accepted are"):
        pack()


def test_forcing_what_an_operation_lacks():
    with ops.backend("native"), pytest.raises(ops.BackendUnavailable, match="newton_schulz has no native kernel"):
        ops.newton_schulz(torch.eye(3))
    with ops.backend("triton"), pytest.raises(ops.BackendUnavailable, match=r"pack_bits.*has no triton kernel"):
        pack()
    assert issubclass(ops.BackendUnavailable, RuntimeError)


@pytest.mark.usefixtures("_no_native")
def test_without_the_native_build():
    found = ops.available()["pack_bits"]["native"]
    assert found == ops.Availability(False, "pgolf._native is not built", "build it with: pip install -e .")
    assert torch.equal(pack(), torch.tensor([0xE1, 0x03], dtype=torch.uint8))
    assert ops.used() == {"pack_bits": "reference"}
    assert ops.fallbacks() == [], "the reference on a CPU is not a fallback to warn about"
    with ops.backend("native"), pytest.raises(ops.BackendUnavailable, match=r"not built \(mend: .*pip install -e \.\)"):
        pack()


def test_the_native_build_is_preferred_where_it_is():
    if not ops.available()["pack_bits"]["native"].ok:
        pytest.skip("pgolf._native is not built")
    pack()
    assert ops.used() == {"pack_bits": "native"}


def test_triton_is_never_chosen_on_a_cpu_unless_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("unpack_dequantize", "cpu") in ("native", "reference")
    if backends._triton("cpu").reason == "triton is not installed":
        pytest.skip("triton is not installed")
    with ops.backend("triton"):
        assert backends.choose("unpack_dequantize", "cpu") == "triton"


def test_why_triton_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = backends._availability("unpack_dequantize", "triton", "cpu")
    assert not found.ok
    assert "TRITON_INTERPRET=1" in found.mend
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends._availability("unpack_dequantize", "triton", "cpu").reason == "triton is not installed"


def test_falling_back_on_cuda_warns_once_by_name(monkeypatch):
    monkeypatch.setattr(backends, "_native_cuda", lambda: backends.Availability(False, "built without CUDA"))
    backends.register("trial")
    with pytest.warns(UserWarning, match=r"trial runs as plain PyTorch on CUDA \(no kernel yet\)"):
        assert backends.choose("trial", "cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("trial", "cuda") == "reference"
    with pytest.warns(UserWarning, match=r"pack_bits .* \(native: built without CUDA\)"):
        backends.choose("pack_bits", "cuda")
    assert ops.fallbacks() == ["trial", "pack_bits"]
    with ops.backend("reference"):
        backends.choose("gptq", "cuda")
    assert ops.fallbacks() == ["trial", "pack_bits"], "what was asked for is not a fallback"


def test_what_no_kernel_takes_is_the_references_and_shows():
    double = torch.eye(3, dtype=torch.float64)
    ops.gptq(double, double, 6)
    assert ops.used()["gptq"] == "reference"
    ops.gptq(double.float(), double.float(), 6)
    assert ops.used()["gptq"] == "native"
    with (
        ops.backend("native"),
        pytest.raises(ops.BackendUnavailable, match="gptq: backend 'native' has no kernel for fl"),
    ):
        ops.gptq(double, double, 6)
    backends.register("trial", native=("cpu", "cuda"))
    with pytest.warns(UserWarning, match=r"trial runs as plain PyTorch on CUDA \(no kernel for float64\)"):
        assert backends.choose("trial", "cuda", "float64") == "reference"
    assert ops.fallbacks() == ["trial"]


def test_the_first_kernel_that_works_is_preferred(monkeypatch):
    backends.register("trial", triton=("cuda",), native=("cpu", "cuda"))
    working = {"native": True, "triton": True}
    monkeypatch.setattr(backends, "_triton", lambda device: backends.Availability(working["triton"], "no triton"))
    monkeypatch.setattr(backends, "_native_cuda", lambda: backends.Availability(working["native"], "no native"))
    assert backends.choose("trial", "cuda") == "triton"
    working["triton"] = False
    assert backends.choose("trial", "cuda") == "native"
    assert "not on cuda" not in ops.available()["trial"]["native"].reason
    working["native"] = False
    with pytest.warns(UserWarning, match="triton: no triton; native: no native"):
        assert backends.choose("trial", "cuda") == "reference"


def test_registering_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        backends.register("trial", fast=("cpu",))


def test_inside_one_graph():
    def traced(x):
        return ops.newton_schulz(x) + 1

    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), traced(x))
    assert ops.used() == {"newton_schulz": "reference"}
    with ops.backend("triton"), pytest.raises(Exception, match="triton needs a CUDA device"):
        compiled(x)
