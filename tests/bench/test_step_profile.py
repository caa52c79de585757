"""The profile of a step by class, and the step of #1855's own script: they run, and count what they should."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import peers

pytest.importorskip("pydantic")
from bench.harness.training_step import make_loader, make_trainer, settings_of, take_step
from bench.step_model import profile as step_profile
from bench.step_model.profile import OPTIMISER, classify

SMALL = {
    "MODEL_DIM": "64",
    "VOCAB_SIZE": "256",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "TRAIN_BATCH_TOKENS": "128",
    "MICRO_BATCH_TOKENS": "128",
    "TRAIN_SEQ_LEN": "32",
    "DTYPE": "float32",
}
KERNELS = {
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90": "attention",
    "pytorch_flash::flash_fwd_kernel": "attention",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products",
    "void cublasLt::splitKreduce_kernel<32, 16>": "products",
    "triton_tem_fused_mm_3": "products",
    "triton_red_fused__to_copy_add_mul_rms_norm_12": "glue",
    "triton_poi_fused_flash_attention_varlen_view_7": "glue",
    "triton_per_fused_softcapped_cross_entropy_sum_0": "glue",
    "residual_rms_norm_backward_kernel": "glue",
    "two_lane_rms_norm_kernel": "glue",
    "qkv_norm_rope_backward_kernel": "glue",
    "embedding_smear_norm_backward_kernel": "glue",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "glue",
    "leaky_relu2_up_kernel": "MLP",
    "linear_leaky_relu_square_kernel": "MLP",
    "softcapped_cross_entropy_kernel": "loss",
    "_softcapped_ce_bwd_kernel": "loss",
    "symmetric_product_kernel": "optimiser",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": "optimiser",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
    "Memcpy HtoD (Pinned -> Device)": "other",
    "autograd::engine::evaluate_function: MmBackward0": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_name(name):
    assert classify(name) == KERNELS[name]
    in_step = classify(name, [OPTIMISER, "aten::bmm"])
    assert in_step == ("communication" if KERNELS[name] == "communication" else "optimiser")


def test_what_an_operation_of_ours_launches_is_of_its_class():
    product = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
    assert classify(product, ["pgolf::leaky_relu2_mlp", "aten::mm"]) == "MLP"
    assert classify(product, ["pgolf::linear_softcapped_cross_entropy"]) == "loss"
    assert classify(product, ["pgolf::flash_attention_4"]) == "attention"
    assert classify(product, ["autograd::engine::evaluate_function: MmBackward0", "aten::mm"]) == "products"


def host(name, *kernels, parent=None, annotation=False):
    kernels = [SimpleNamespace(name=each, duration=microseconds) for each, microseconds in kernels]
    return SimpleNamespace(
        name=name, kernels=kernels, cpu_parent=parent, is_user_annotation=annotation, device_type=DeviceType.CPU
    )


def on_device(name, microseconds, annotation=False):
    span = SimpleNamespace(start=0, end=microseconds)
    return SimpleNamespace(name=name, time_range=span, is_user_annotation=annotation, device_type=DeviceType.CUDA)


def test_each_kernel_of_a_gpu_counts_once(monkeypatch):
    """As torch.profiler gives them: kernels hang on what launched them, stand beside it too, and ranges look alike."""
    monkeypatch.setattr(step_profile, "CUDA", True)
    product = "nvjet_tst_128x256"
    optimise = host(OPTIMISER, (OPTIMISER, 900), annotation=True)
    events = [
        host("aten::mm", (product, 100)),
        optimise,
        host("aten::bmm", (product, 40), parent=host("aten::matmul", parent=optimise)),
        host("c10d::allgather", ("ncclDevKernel_AllGather", 30), parent=optimise),
        on_device(product, 100),
        on_device(product, 40),
        on_device("ncclDevKernel_AllGather", 30),
        on_device(OPTIMISER, 900, annotation=True),
        on_device(product, 100),  # of a graph that was replayed
        on_device("triton_poi_fused_add_0", 7),
    ]
    found = step_profile.breakdown(events, steps=2)
    assert found == {
        "products": {"ms": 0.1, "launches": 1},
        "glue": {"ms": 0.0035, "launches": 0.5},
        "communication": {"ms": 0.015, "launches": 0.5},
        "optimiser": {"ms": 0.02, "launches": 0.5},
    }


def test_a_real_step_is_broken_down(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step_profile, "settings_of", lambda preset, **environ: settings_of(preset, **SMALL, **environ))
    path = tmp_path / "profile.json"
    assert step_profile.main(["--preset", "demo", "--steps", "2", "--json", str(path), "GRAD_CLIP_NORM=0.5"]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["settings"] == {"GRAD_CLIP_NORM": "0.5"}
    classes = found["classes"]
    assert {"products", "MLP", "loss", "glue", "optimiser", "other"} <= classes.keys()
    assert all(row["ms"] > 0 and row["launches"] > 0 for row in classes.values())
    assert sum(row["ms"] for row in classes.values()) == pytest.approx(found["sum_ms"])
    # Of three layers q, k, v, output and attention's two products, thrice each, and the gradient that the MLP hands on;
    # of the head and of SmearGate three each.
    assert classes["products"]["launches"] == 3 * (3 * (4 + 2) + 1) + 3 + 3
    assert classes["other"]["launches"] < 0.15 * sum(row["launches"] for row in classes.values())
    assert "products" in capsys.readouterr().out


class Stream:
    def wait_stream(self, other):
        pass


def test_the_step_of_1855s_script(monkeypatch, tmp_path):
    """On a CPU without its kernels: its first loss is ours, and it learns."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))
    settings = settings_of("pr1855", **SMALL, NUM_LAYERS="9")
    try:
        make = peers._loaded("pr_1855", "training_step")
    except peers.NoPeer as reason:
        pytest.skip(str(reason))
    for looping in (False, True):
        ours = make_trainer(settings, tmp_path, last_phase=looping)
        theirs = make(settings, "plain", looping, make_loader(settings, tmp_path), torch.device("cpu"))
        assert ours.model.looping == looping
        losses = [float(theirs()) for _ in range(3)]
        assert losses[0] == pytest.approx(float(take_step(ours)), rel=2e-2)
        assert len(set(losses)) == 3
        assert losses[-1] < 1.2 * losses[0]
