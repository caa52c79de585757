"""The entries' own models, to compare logits and loss with: their classes, from their scripts, on a CPU.

Each function takes the checkout and settings of ours and returns their GPT, with their initial weights. FlashAttention
is stood in for by torch's scaled_dot_product_attention, document by document.
"""

import ast
import base64
import itertools
import lzma
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import take
from bench.peers.parameter_golf import RECORD, REPOSITORY
from pgolf.settings import Settings

__all__ = ["REPOSITORY", "baseline", "load", "pr1493", "pr1855"]

PR1493 = "records/track_10min_16mb/2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT/train_gpt.py"
CLASSES = ["RMSNorm", "CastedLinear", "Rotary", "apply_rotary_emb", "CausalSelfAttention", "MLP", "Block", "GPT"]
SHAPE = (
    "vocab_size num_layers model_dim num_heads num_kv_heads tied_embed_init_std logit_softcap rope_base qk_gain_init"
)
STACK = "train_seq_len ln_scale rope_dims xsa_last_n num_loops loop_start loop_end skip_gates_enabled mlp_mult"
GATES = (
    "attn_out_gate_enabled attn_out_gate_src gate_window sparse_attn_gate_enabled sparse_attn_gate_scale "
    "smear_gate_enabled parallel_start_layer parallel_final_lane"
)


def load(checkout: Path) -> SimpleNamespace:
    return SimpleNamespace(
        baseline=lambda settings: baseline(checkout, settings),
        pr1493=lambda settings: pr1493(checkout, settings),
        pr1855=lambda settings: pr1855(checkout, settings),
    )


def baseline(checkout: Path, settings: Settings) -> nn.Module:
    """It gives the loss alone: its logits are caught on their way there."""
    caught: list[Tensor] = []

    def cross_entropy(logits: Tensor, *others: Any, **options: Any) -> Tensor:
        caught[:] = [logits]
        return F.cross_entropy(logits, *others, **options)

    used = ("rms_norm", "linear", "scaled_dot_product_attention")
    functional = SimpleNamespace(**{name: getattr(F, name) for name in used}, cross_entropy=cross_entropy)
    gpt = take(checkout / "train_gpt.py", CLASSES, {**_given(), "F": functional}).GPT
    model = gpt(**_values(settings, SHAPE), mlp_mult=int(settings.mlp_mult), tie_embeddings=True).float()

    def forward_logits(tokens: Tensor) -> Tensor:
        model(tokens, tokens)
        return caught[0].view(*tokens.shape, -1)

    model.forward_logits = forward_logits
    return model


def pr1493(checkout: Path, settings: Settings) -> nn.Module:
    path = checkout / PR1493
    gpt = take(path, CLASSES, _given(), _unpacked(path)).GPT
    values = _values(settings, f"{SHAPE} {STACK} parallel_residual_start")
    return gpt(SimpleNamespace(**values, tie_embeddings=True, embedding_dim=settings.model_dim)).float().eval()


def pr1855(checkout: Path, settings: Settings) -> nn.Module:
    gpt = take(checkout / RECORD, CLASSES, {**_given(), "BOS_ID": settings.bos_id}).GPT
    values = _values(settings, f"{SHAPE} {STACK} {GATES}")
    others = {"gated_attn_enabled": False, "gated_attn_init_std": 0.0, "sparse_attn_gate_init_std": 0.0}
    never = {"fused_ce_enabled": False, "rope_yarn": False, "tie_embeddings": True, **others}
    return gpt(SimpleNamespace(**values, **never)).float().eval()  # evaluation: its training wants Triton


def _values(settings: Settings, names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names.split()}


def _unpacked(path: Path) -> str:
    """The model's part of a script that is one exec of a string in base 85 and raw LZMA2.

    The rest of it is left out, because some of it is only Python from 3.12 on.
    """
    strings = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    packed = base64.b85decode(max(strings, key=len))
    text = lzma.decompress(packed, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]).decode()
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)  # each begins with a line that is not indented
    return "".join(block for block in blocks if re.match(rf"(class|def) ({'|'.join(CLASSES)})\b", block))


def _given() -> dict[str, Any]:
    stand_ins: dict[str, Callable[..., Tensor]] = {
        "flash_attn_3_func": _flash_attn,
        "flash_attn_varlen_func": _flash_attn_varlen,
    }
    return {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "math": math, **stand_ins}


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(rows, length, heads, head_dim) -> like q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def _flash_attn_varlen(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, causal: bool, **_: Any) -> Tensor:
    """(tokens, heads, head_dim) -> like q."""
    borders = cu_seqlens_q.unique().tolist()
    spans = [slice(start, end) for start, end in itertools.pairwise(borders)]
    return torch.cat([_flash_attn(q[None, span], k[None, span], v[None, span], causal)[0] for span in spans])
