"""Which tokens belong together: the rows of a batch, or documents packed one after the other.

Packed documents are given by `cu_seqlens`, int32 (count + 1,): the first is 0, document i is the tokens
cu_seqlens[i] … cu_seqlens[i + 1] - 1 of the flattened batch, the last is its length. Equal entries at the end are
padding, so that batches of different numbers of documents have one shape and compile once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    positions: Tensor  # (length,) int64, of each token in its document
    starts: Tensor  # (1, length) bool, (rows, length) where tokens themselves begin documents
    cu_seqlens: Tensor | None = None
    longest: int = 0  # tokens in a document, at most


def rows_as_documents(tokens: Tensor) -> Documents:
    """Each row of tokens (rows, length) on its own."""
    positions = torch.arange(tokens.size(1), device=tokens.device)
    return Documents(positions, (positions == 0).unsqueeze(0), None, tokens.size(1))


def packed_documents(tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Documents:
    """Of tokens (1, length); `max_seqlen` bounds the documents' lengths, 0 if nothing better is known."""
    index = torch.arange(tokens.size(1), device=tokens.device)
    document = torch.searchsorted(cu_seqlens, index, right=True, out_int32=True) - 1
    positions = index - cu_seqlens[document]
    return Documents(positions, (positions == 0).unsqueeze(0), cu_seqlens, max_seqlen or tokens.size(1))
