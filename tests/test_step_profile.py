"""The profile of a step by class, and the step of #1855's own script: they run, and count what they should."""

import contextlib
import json

import peers
import pytest
import torch

pytest.importorskip("pydantic")
import step_profile
from step_profile import OPTIMISER, classify
from training_step import make_loader, make_trainer, settings_of, take_step

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
    assert classes["other"]["ms"] < 0.2 * found["sum_ms"]
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
