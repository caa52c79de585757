"""Causal attention behind one function, never across the boundaries of documents.

Backends, in the order in which `ATTENTION=auto` takes the first that is there:

    flash3, flash4    FlashAttention 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`)
    varlen            torch.nn.attention.varlen
    sdpa              torch's scaled_dot_product_attention; packed documents become rows
    plain             the definition in matrix products; for short rows on CPUs

The first three need CUDA and float16 or bfloat16. `choose_attention` is called once, before anything is compiled.
flash4, whose compiler works when it is called, is first tried forward and backward in a process of its own (trial.py).
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.errors import UserError
from pgolf.model.attention import trial
from pgolf.model.attention.flash import Packed, load_flash3, load_flash4, load_varlen
from pgolf.model.attention.plain import PLAIN_LENGTH, by_rows, padding, plain, sdpa

__all__ = ["attention", "choose_attention", "padding"]

FLASH: dict[str, Callable[[], Packed]] = {"flash3": load_flash3, "flash4": load_flash4, "varlen": load_varlen}
ROWS = {"sdpa": sdpa, "plain": plain}
LOADED: dict[str, Packed] = {}  # of these, what `choose_attention` has found
TRIED_FIRST = ("flash4",)


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype, length: int) -> str:
    """The backend for rows or documents of up to `length` tokens: `wanted`, or with "auto" the best that is there.

    `UserError` when one is wanted by name that cannot be used here.
    """
    if wanted in ROWS:
        return wanted
    if wanted != "auto":
        if reason := _missing(wanted, device, dtype):
            raise UserError(f"ATTENTION={wanted}: {reason}")
        return wanted
    if device.type == "cpu":
        return _rows_backend("cpu", length)
    return next((name for name in FLASH if not _missing(name, device, dtype, warn=True)), "sdpa")


def attention(
    q: Tensor,  # (rows, length, heads, head_dim)
    k: Tensor,  # (rows, length, kv_heads, head_dim)
    v: Tensor,  # like k
    cu_seqlens: Tensor | None = None,  # (count + 1,) int32: the documents of a single row; None: each row is one
    max_seqlen: int = 0,  # of a document, at most; not used without cu_seqlens
    backend: str = "auto",  # what `choose_attention` returned; "auto": sdpa or plain
) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v over the tokens of the same document up to each one; like q.

    Each group of heads / kv_heads query heads shares a key and value head.
    """
    rows, length = q.shape[:2]
    if backend in FLASH:
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length
            max_seqlen = length
        y = LOADED[backend](q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, max_seqlen)
        return y.view_as(q)
    if backend == "auto":
        backend = _rows_backend(q.device.type, length if cu_seqlens is None else max_seqlen)
    if cu_seqlens is None:
        return ROWS[backend](q, k, v)
    return by_rows(ROWS[backend], q, k, v, cu_seqlens, max_seqlen)


def _rows_backend(device_type: str, length: int) -> str:
    return "plain" if device_type == "cpu" and length <= PLAIN_LENGTH else "sdpa"


def _missing(name: str, device: torch.device, dtype: torch.dtype, warn: bool = False) -> str:
    """Why a backend cannot be used, or "" after loading it. `warn` of one that is installed and fails its trial."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    major = torch.cuda.get_device_capability(device)[0]
    if name == "flash3" and major not in (8, 9):
        return f"is for compute capability 8.x and 9.x, this device has {major}.x"
    if name not in LOADED:
        try:
            loaded = FLASH[name]()
        except Exception as error:  # whatever importing somebody's build raises
            return f"cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        if name in TRIED_FIRST and (failed := trial.failure(name, device, dtype)):
            if warn:
                warnings.warn(f"pgolf: {name} is installed and not used: {failed}", stacklevel=3)
            return failed
        LOADED[name] = loaded
    return ""
