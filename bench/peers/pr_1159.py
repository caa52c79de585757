"""PR 1159's hashed cache of orders 2 to 7 in numpy. Its numbers do not sum to one over the vocabulary.

It is on no branch: whoever measures puts the pull request's folder into the checkout.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.peers import load_module

REPOSITORY = "openai/parameter-golf"
CACHE = "records/track_non_record_16mb/2026-03-27_DirichletPPM_LegalTTT_8xH100/frontier_cache.py"
CHUNK = 32_768  # tokens scored before any of them is counted


def ngram_cache(checkout: Path) -> Callable:
    """(tokens (T,), logprob (T,)) -> its probabilities (T,), "ppm" to order 7 with Dirichlet weights."""
    theirs = load_module(checkout / CACHE)
    environ = {"CAUSAL_CACHE_MODE": "ppm", "CAUSAL_CACHE_MAX_ORDER": "7", "CAUSAL_CACHE_MIXING": "dirichlet"}

    def call(tokens: np.ndarray, logprob: np.ndarray) -> torch.Tensor:
        cache = theirs.causal_cache_from_env(environ)
        parts = []
        for begin in range(0, len(tokens), CHUNK):
            here = np.arange(begin, min(begin + CHUNK, len(tokens)))
            parts.append(cache.score_segment(tokens, here, np.exp(logprob[here])))
            cache.commit_segment(tokens, here)
        return torch.from_numpy(np.concatenate(parts))

    return call
