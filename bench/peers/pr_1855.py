"""The training step of PR #1855's own script: its model, fused block and loss, Muon and AdamW, compiled as it does.

Attention is ours, by the backend that our model takes, so that the rest of the step is compared; and so are the data.
Left out are its moving average and its logging. It needs CUDA.
"""

import collections
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.peers import take
from bench.peers.parameter_golf import RECORD, REPOSITORY
from bench.peers.parameter_golf import _given as kernels_given
from bench.peers.parameter_golf_models import CLASSES, GATES, SHAPE, STACK, _values
from bench.peers.parameter_golf_models import _given as model_given
from pgolf.model.attention import attention
from pgolf.settings import Settings

__all__ = ["REPOSITORY", "training_step"]

LOSS = (
    "_FUSED_CE_LIBRARY _FUSED_CE_BLOCK_SIZE _FUSED_CE_NUM_WARPS _softcapped_ce_fwd_kernel _softcapped_ce_bwd_kernel "
    "_validate_softcapped_ce_inputs softcapped_ce_op softcapped_ce_backward_op _softcapped_ce_setup_context "
    "_softcapped_ce_backward softcapped_cross_entropy"
)
BLOCK = (
    "linear_leaky_relu_square_kernel linear_leaky_relu_square FusedLinearLeakyReLUSquareFunction "
    "FusedLeakyReLUSquareMLP"
)
OPTIMISERS = (
    "_PE_COEFFS zeropower_via_newtonschulz5 Muon CONTROL_TENSOR_NAME_PATTERNS PACKED_REPLICATED_GRAD_MAX_NUMEL "
    "Optimizers restore_fp32_params"
)
RATES = (
    "tied_embed_lr matrix_lr scalar_lr beta1 beta2 adam_eps muon_momentum muon_backend_steps muon_row_normalize "
    "grad_clip_norm"
)
DECAYS = {"muon_wd": "muon_weight_decay", "embed_wd": "embed_weight_decay", "adam_wd": "adam_weight_decay"}


RATE = 0.1  # of theirs, as in our step: random tokens teach nothing


def training_step(checkout: Path) -> Callable:
    """(settings, attention backend, looping, loader, device) -> a step; a step takes the loader's next batch, which
    must be one micro-batch, and returns the loss."""
    kernels = kernels_given() if torch.cuda.is_available() else {}
    names = [*CLASSES, *OPTIMISERS.split(), *((LOSS + " " + BLOCK).split() if kernels else ())]

    def make(settings: Settings, backend: str, looping: bool, loader: Any, device: torch.device) -> Callable:
        given = {**model_given(), **kernels, "os": os, "collections": collections, "dist": dist}
        taken = take(checkout / RECORD, names, {**given, **_attention(backend), "BOS_ID": settings.bos_id})
        h = _hyperparameters(settings, fused=bool(kernels))
        model = taken.GPT(h).to(device).bfloat16()
        taken.restore_fp32_params(model)
        model.looping_active = looping
        for block in model.blocks:
            block.mlp.use_fused = bool(kernels)
            block.attn.rotary(settings.train_batch_tokens, device, torch.bfloat16)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        optimizers = taken.Optimizers(h, model)
        parameters = list(model.parameters())
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] *= RATE

        def step() -> Tensor:
            (batch,) = loader.next_batch().micro_batches(settings.train_batch_tokens, settings.train_seq_len)
            with torch.autocast(device_type=device.type, dtype=torch.bfloat16):
                loss = compiled(batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, h.grad_clip_norm)
            optimizers.step()
            return loss.detach()

        return step

    return make


def _hyperparameters(settings: Settings, fused: bool) -> SimpleNamespace:
    values = _values(settings, f"{SHAPE} {STACK} {GATES} {RATES}")
    values |= {theirs: getattr(settings, ours) for theirs, ours in DECAYS.items()}
    others = {"gated_attn_enabled": False, "gated_attn_init_std": 0.0, "sparse_attn_gate_init_std": 0.0}
    return SimpleNamespace(**values, **others, fused_ce_enabled=fused, rope_yarn=False, tie_embeddings=True)


def _attention(backend: str) -> dict[str, Callable[..., Tensor]]:
    """FlashAttention 3's two functions, as the script calls them."""

    def rows(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return attention(q, k, v, backend=backend)

    def packed(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, **_: Any) -> Tensor:
        return attention(q[None], k[None], v[None], cu_seqlens_q, max_seqlen_q, backend)[0]

    return {"flash_attn_3_func": rows, "flash_attn_varlen_func": packed}
