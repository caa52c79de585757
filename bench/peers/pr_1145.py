"""PR 1145's hints from contexts of 15 tokens, in C, without its other experts (whose gates look at the target).

It is on no branch: whoever measures puts the pull request's folder into the checkout, and builds the library there with
`gcc -O3 -march=native -shared -fPIC -o libonline_ngram_state.so online_ngram_state.c`, as its own script does.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

REPOSITORY = "openai/parameter-golf"
LIBRARY = "records/track_10min_16mb/2026-03-29_Loader_FullGPTQ_XSA11_OnlineNgramAgreement/libonline_ngram_state.so"
LOAD = 0.55  # of its tables, as in its script


def ngram_hints(checkout: Path) -> Callable:
    """tokens (T,) -> the share that its hint has of the context's past (T,) float32."""
    path = checkout / LIBRARY
    if not path.is_file():
        raise LookupError(f"no {LIBRARY}; its source is to be built by hand")
    library = ctypes.CDLL(str(path))
    library.online_ngram_state_create.restype = ctypes.c_void_p
    step, destroy = library.online_ngram_state_process_chunk, library.online_ngram_state_destroy
    step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 7]
    destroy.argtypes = [ctypes.c_void_p]

    def call(tokens: np.ndarray) -> torch.Tensor:
        tokens = np.ascontiguousarray(tokens, np.uint16)
        bits = max(10, int(np.ceil(np.log2(max(len(tokens), 1) / LOAD))))
        state = library.online_ngram_state_create(15, bits, 10)
        no_words = np.ones(1 << 16, np.uint8)  # every token a boundary: the expert within words has nothing to do
        hint, share = np.empty(len(tokens), np.uint16), np.empty(len(tokens), np.float32)
        unused = np.empty(len(tokens), np.uint16), np.empty(len(tokens), np.float32), np.empty(len(tokens), np.uint8)
        arrays = (no_words, no_words, hint, share, *unused)
        failed = step(state, tokens.ctypes.data, len(tokens), *(array.ctypes.data for array in arrays))
        destroy(state)
        if failed:
            raise RuntimeError(f"its state returned {failed}")
        return torch.from_numpy(share)

    return call
