"""Windows of scoring: every target once, with the context it was promised, and never across a document."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.evaluation.windows import ScoringBatches

BOS = 1


def contexts(tokens, batches) -> list[tuple[int, list[int]]]:
    """(target, the tokens it is predicted from) in the order of scoring, out of what a model would be given."""
    found = []
    for batch, scored, _ in batches:
        inputs, targets = batch.inputs.flatten().tolist(), batch.targets.flatten().tolist()
        borders = batch.cu_seqlens
        if borders is None:
            borders = torch.arange(0, len(inputs) + 1, batch.inputs.size(1))
        else:
            assert max(borders.diff()) <= batch.max_seqlen
        for place in scored.tolist():
            begin = int(borders[borders <= place].max())
            found.append((targets[place], inputs[begin : place + 1]))
    return found


def expected(tokens: list[int], seq_len: int, stride: int, documents: bool) -> list[tuple[int, list[int]]]:
    """The definition, one target after the other."""
    found, begin, end = [], 0, 0  # of the text
    for target in range(1, len(tokens)):
        if target == 1 or (documents and tokens[target - 1] == BOS):
            begin = target - 1
            end = next((i for i in range(target, len(tokens) - 1) if documents and tokens[i] == BOS), len(tokens) - 1)
        last = min(begin + seq_len, end)  # the window's end: the first that holds the target's last input
        while last < target:
            last = min(last + stride, end)
        found.append((tokens[target], tokens[max(begin, last - seq_len) : target]))
    return found


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_target_is_scored_once_from_the_context_it_was_promised(data):
    count = data.draw(st.integers(2, 90))
    tokens = data.draw(st.lists(st.sampled_from([BOS, 2, 3, 4, 5, 6]), min_size=count, max_size=count))
    seq_len = data.draw(st.integers(1, 40))
    stride = data.draw(st.integers(1, seq_len))
    documents = data.draw(st.booleans())
    batch_tokens = data.draw(st.integers(1, 120))
    asked = (torch.tensor(tokens), seq_len, batch_tokens, stride, BOS if documents else None)
    whole = contexts(tokens, ScoringBatches(*asked))
    assert whole == expected(tokens, seq_len, stride, documents)
    for world_size in (2, 3):
        shares = [batch for rank in range(world_size) for batch in ScoringBatches(*asked, rank, world_size)]
        assert contexts(tokens, sorted(shares, key=lambda batch: batch.first)) == whole


@pytest.mark.parametrize("documents", [False, True])
def test_batches_keep_to_their_size_and_are_the_same_for_all_ranks(documents):
    tokens = torch.randint(1, 50, (5000,))
    asked = (tokens, 64, 300, 16, BOS if documents else None)
    whole = list(ScoringBatches(*asked))
    assert all(batch.inputs.numel() <= 300 for batch, *_ in whole)
    assert sum(batch.inputs.numel() for batch, *_ in whole) > 0.7 * 300 * len(whole)
    for rank in range(3):
        for ours, theirs in zip(whole[rank::3], ScoringBatches(*asked, rank, 3), strict=True):
            assert torch.equal(ours.batch.inputs, theirs.batch.inputs)
    assert [batch.first for batch in whole] == np.cumsum([0] + [len(batch.scored) for batch in whole])[:-1].tolist()


def test_without_overlap_only_the_last_window_looks_back():
    tokens = torch.arange(2, 25)  # 22 targets
    rows = [batch for batch, *_ in ScoringBatches(tokens, 8, 16)]
    assert [row.inputs[:, 0].tolist() for row in rows] == [[2, 10], [16]]
    assert [len(scored) for _, scored, _ in ScoringBatches(tokens, 8, 16)] == [16, 6]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_score(count):
    assert list(ScoringBatches(torch.ones(count, dtype=torch.int32), 4, 2)) == []
    assert list(ScoringBatches(torch.ones(count, dtype=torch.int32), 4, 2, bos_id=BOS)) == []
