"""What is added to a token's embedding or values: SmearGate, bigram hash and value embeddings."""

import torch

from pgolf.model.bigram_hash import bigram_buckets
from pgolf.model.value_embedding import value_embeddings
from pgolf.ops.embedding_smear_norm import smear


def test_without_mask_smear_gate_reads_across_a_begin_of_document(random_model):
    """What SMEAR_GATE_BOS_FIX mends in rows that hold several documents."""
    tokens = torch.randint(2, 64, (1, 9))
    tokens[0, 4] = 1
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 7) % 62 + 2
    for fix in (True, False):
        model = random_model(smear_gate_enabled=True, smear_gate_bos_fix=fix, num_layers=1)
        model.kv_bank.data.zero_()  # so that attention carries nothing over
        with torch.inference_mode():
            same = torch.equal(model(tokens)[0, 4], model(changed)[0, 4])
        assert same == fix


def test_smear_takes_in_the_token_before_and_none_where_a_document_starts():
    x, weight, strength = torch.randn(2, 6, 8), torch.randn(1, 3), torch.tensor([0.7])
    starts = torch.tensor([[True, False, False, True, False, False]])
    found = smear(x, weight, strength, starts)
    for t in range(6):
        gate = 0.7 * torch.sigmoid(x[:, t, :3] @ weight[0]).unsqueeze(-1)
        torch.testing.assert_close(found[:, t], x[:, t] if starts[0, t] else x[:, t] + gate * x[:, t - 1])


def test_bigrams_share_a_bucket_only_by_chance():
    """A bucket depends on both tokens and their order; the last one is kept for tokens with none before them."""
    buckets, pairs = 1009, torch.cartesian_prod(torch.arange(40), torch.arange(40))
    starts = torch.tensor([[True, False]]).expand(len(pairs), 2)
    found = bigram_buckets(pairs, starts, buckets)
    assert (found[:, 0] == buckets - 1).all()
    assert found[:, 1].min() >= 0
    assert found[:, 1].max() < buckets - 1
    fullest = found[:, 1].bincount().max()
    assert fullest <= 12, "1,600 pairs in 1,008 buckets"


def test_layers_scale_one_value_embedding():
    tokens, table, projection = torch.randint(5, (2, 7)), torch.randn(5, 3), torch.randn(4, 3)
    scale, layer_scales = torch.tensor([0.1]), torch.tensor([1.0, -2.0, 0.5])
    found = value_embeddings(tokens, table, projection, scale, layer_scales)
    expected = [0.1 * s * table[tokens] @ projection.T for s in (1.0, -2.0, 0.5)]
    torch.testing.assert_close(found, expected)
