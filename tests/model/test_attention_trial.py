"""The trial of an attention in a process of its own: one that works, and those that do not, without a GPU."""

import sys
import time
import warnings

import pytest
import torch

import pgolf.model.attention
from pgolf.errors import UserError
from pgolf.model.attention import choose_attention, trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# flash_attn.cute.interface by formula (inside an operation autograd records nothing), its gradients times FACTOR.
INTERFACE = """
import torch

def scores(q, k, borders):
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    token = torch.arange(len(q))
    document = torch.searchsorted(borders.long(), token, right=True)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    s = torch.einsum("ihd,jhd->hij", q, k) * q.size(-1) ** -0.5
    return s.masked_fill(~seen, -torch.inf).softmax(-1), k

def grouped(x, kv_heads):
    return x.unflatten(1, (kv_heads, -1)).sum(2)

def _flash_attn_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, return_lse):
    p, _ = scores(q, k, cu_seqlens_q)
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    return torch.einsum("hij,jhd->ihd", p, v), torch.zeros(q.size(1), q.size(0))

def _flash_attn_bwd(q, k, v, y, dy, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    kv_heads, scale = k.size(1), q.size(-1) ** -0.5
    p, k = scores(q, k, cu_seqlens_q)
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    dp = torch.einsum("ihd,jhd->hij", dy, v)
    ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
    dq = torch.einsum("hij,jhd->ihd", ds, k)
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, dy)
    return FACTOR * dq, FACTOR * grouped(dk, kv_heads), FACTOR * grouped(dv, kv_heads)
"""


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        ("1.0", ""),
        ("1.2", "its trial, forward and backward, ended with status 1: flash4 is off by 0.2 of the largest value"),
    ],
)
def test_trial_of_a_made_up_flash_attention_4(tmp_path, monkeypatch, factor, said):
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent):
        (path / "__init__.py").touch()
    (folder / "interface.py").write_text(INTERFACE.replace("FACTOR", factor))
    monkeypatch.syspath_prepend(tmp_path)
    assert trial.failure("flash4", CPU, torch.float32 if said else torch.float64) == said  # each dtype is tried once


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("pass", ""),
        ("import os; os.kill(os.getpid(), 11)", "its trial, forward and backward, was ended by signal 11"),
        (
            "raise ValueError('no\\nsuch layout\\n')",
            "its trial, forward and backward, ended with status 1: such layout",
        ),
    ],
)
def test_how_a_trial_ends(code, said):
    assert trial.try_in_process([sys.executable, "-c", code]) == said


def test_what_never_returns_is_ended_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.02)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1000)"
    assert trial.try_in_process([sys.executable, "-c", code], 1.5) == (
        "its trial, forward and backward, did not end within 1.5 s"
    )
    assert mark.exists()
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


@pytest.mark.parametrize("failed", ["", "its trial, forward and backward, did not end within 120 s"])
def test_flash4_is_chosen_only_after_its_trial(monkeypatch, failed):
    asked = []

    def failure(name, device, dtype):
        asked.append((name, device, dtype))
        return failed

    def absent():
        raise ImportError("absent")

    attention = pgolf.model.attention
    for name in attention.FLASH:
        monkeypatch.setitem(attention.FLASH, name, absent if name == "flash3" else lambda: lambda *_: None)
    monkeypatch.setattr(attention, "LOADED", {})
    monkeypatch.setattr(trial, "failure", failure)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        chosen = choose_attention("auto", CUDA, torch.bfloat16, 1024)
    assert asked == [("flash4", CUDA, torch.bfloat16)]
    if not failed:
        assert (chosen, warned) == ("flash4", [])
        return
    assert chosen == "varlen"
    assert [str(one.message) for one in warned] == [f"pgolf: flash4 is installed and not used: {failed}"]
    with pytest.raises(UserError, match=f"^ATTENTION=flash4: {failed}$"):
        choose_attention("flash4", CUDA, torch.bfloat16, 1024)
