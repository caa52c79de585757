"""Gates on attention's output, and exclusive self-attention."""

import pytest
import torch

from pgolf.model.attention_gate import gate_logits, gate_rows
from pgolf.ops.xsa_gate import exclude_self, gate_heads


@pytest.mark.parametrize("by_query", [True, False])
def test_rows_of_a_larger_product_are_the_gates_logits(by_query):
    h, weight, query = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 16), (4, 6), (16, 16)))
    source = h @ query.T if by_query else h
    rows = gate_rows(weight, query if by_query else None, 16)
    assert rows.shape == (4, 16)
    torch.testing.assert_close(h @ rows.T, gate_logits(source, weight))


def test_a_gate_of_zero_logits_halves_the_gain():
    y = torch.randn(2, 5, 4, 8)
    torch.testing.assert_close(gate_heads(y, torch.zeros(2, 5, 4), gain=2.0), y)
    torch.testing.assert_close(
        gate_heads(y, torch.full((2, 5, 4), 3.0), scale=0.5), y * torch.sigmoid(torch.tensor(1.5))
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_nothing_is_left_along_the_own_value(kv_heads):
    y, v = torch.randn(2, 5, 4, 8, dtype=torch.float64), torch.randn(2, 5, kv_heads, 8, dtype=torch.float64)
    found, repeated = exclude_self(y, v), v.repeat_interleave(4 // kv_heads, dim=2)
    torch.testing.assert_close((found * repeated).sum(-1), torch.zeros(2, 5, 4, dtype=torch.float64))
    along = ((y - found) * repeated).sum(-1) / (y - found).norm(dim=-1) / repeated.norm(dim=-1)
    torch.testing.assert_close(along.abs(), torch.ones_like(along))
