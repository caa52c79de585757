"""A causal n-gram cache: what a stream has said so far, mixed with a model's probability of what it says next.

Algorithm, layout and prefetching: csrc/ngram/ngram_counts.h, csrc/ngram/ngram_mix.h, csrc/ngram/hint_counts.h. `score`
looks ahead in its argument to fetch memory, never to compute. One thread; the interpreter's lock is released.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pgolf.ops import backends

MIXINGS = ("adaptive", "dirichlet", "pyp", "tilt")
MOST_ORDER = 16
LOWEST_LOGPROB = -700.0  # a float64 probability still

Array = npt.NDArray[Any]
ArrayLike = Array | torch.Tensor | Sequence[float]


class NgramCache:
    """Counts of what a stream of tokens has said so far, mixed with a model's probabilities of what it says next.

    The base is the last level of a chain of interpolations, so only its probability of the token that came is needed,
    and the mixture sums to one wherever the base does:

        p_0 = base(x),   p_k = w_k c_k(x) / n_k + (1 - w_k) p_(k-1),   k-th context seen n_k times, c_k(x) times before
        x

    - "adaptive": w_k learned online by order, n_k and the number of distinct successors t_k, one EM step after each
      token that was scored; then mixed with the base by the posterior of the two, which bounds what the cache can cost
      over any
      stream: about one bit, and 2e-5 bits a token.
    - "dirichlet": p_k = (c_k(x) + a p_(k-1)) / (n_k + a).
    - "pyp": p_k = (max(c_k(x) - d, 0) + (a + d t_k) p_(k-1)) / (n_k + a), Pitman-Yor with one table a successor.
    - "dirichlet" and "pyp": p is 2.2e-308 at least, since many small factors can end in 0.
    - "tilt": at most one hint h from the strict prefix, p(x) e^(b [x = h]) / (1 + p(h) (e^b - 1)).

    A probability depends on the tokens before, on the model's probabilities of them, and on the settings; however a
    stream is cut into calls, the results are the same. Counts are exact: a context is compared whole, never by its hash
    alone. A context or successor that finds no place is not counted and `stats()` says how often that was; all that was
    counted stays right and normalised. A context's total stops at 65535, and the counts of its successors with it. The
    stream itself is kept for its first memory_bytes / 32 tokens (tilt: / 25); later ones add to known contexts and make
    no new ones.

    Args:
        vocab_size: 1 to 65536; tokens are integers (count,) in 0..vocab_size-1.
        orders: ascending, each 2 to 16, the token itself counted: order 7 looks at 6 tokens. By default 2 to 7; "tilt"
            takes one, 16 by default.
        mixing: "adaptive", "dirichlet", "pyp" or "tilt".
        memory_bytes: fixed when the cache is made, taken from the system as it is touched; English text needs about 40
            bytes a token.
        document_reset: drop all counts after a boundary_token; learned weights stay.
        boundary_token: contexts go back to it and no further.
        concentration: a, of "dirichlet" (64 by default) and "pyp" (16), in counts.
        discount: d of "pyp", in counts.
        threshold: of "tilt": a hint came true in this share of its cases, or its gate is closed.
        boost: b of "tilt", in nats.
    Raises:
        ValueError: a setting that is not accepted; it is named.
        MemoryError: memory_bytes that the system does not give.
    Example:
        >>> import math, numpy as np
        >>> from pgolf import NgramCache
        >>> cache = NgramCache(vocab_size=16, memory_bytes=1 << 22)
        >>> tokens = np.arange(64) % 4
        >>> base = np.full(64, -math.log(16))  # a model that knows nothing
        >>> logprob = cache.score(tokens, base)
        >>> logprob.shape, bool(logprob[32:].mean() > -0.5)  # the repetition was noticed
        ((64,), True)

    Sources: "dirichlet", MacKay and Peto, 1995; "pyp", Teh, ACL 2006; "tilt", PRs #1514 and #2135 of the
    challenge with their token expert alone.
    """

    def __init__(
        self,
        vocab_size: int,
        orders: Sequence[int] | None = None,
        mixing: str = "adaptive",
        memory_bytes: int = 1 << 28,
        document_reset: bool = False,
        boundary_token: int | None = None,
        concentration: float | None = None,
        discount: float = 0.7,
        threshold: float = 0.8,
        boost: float = 2.625,
    ):
        _need(mixing in MIXINGS, "mixing", mixing, " or ".join(MIXINGS))
        default = (16,) if mixing == "tilt" else (2, 3, 4, 5, 6, 7)
        orders = default if orders is None else tuple(orders)
        ascending = all(2 <= order <= MOST_ORDER for order in orders) and list(orders) == sorted(set(orders))
        _need(bool(orders) and ascending, "orders", orders, f"ascending numbers from 2 to {MOST_ORDER}")
        _need(mixing != "tilt" or len(orders) == 1, "orders", orders, "one order with mixing='tilt'")
        if concentration is None:
            concentration = 64.0 if mixing == "dirichlet" else 16.0
        _need(0 < concentration < float("inf"), "concentration", concentration, "a positive number")
        _need(0 <= discount < 1, "discount", discount, "0 to less than 1")
        _need(0 < threshold <= 1, "threshold", threshold, "more than 0, at most 1")
        _need(abs(boost) <= 50, "boost", boost, "-50 to 50")
        _need(not document_reset or boundary_token is not None, "boundary_token", None, "a token with document_reset")
        self.vocab_size, self.orders, self.mixing, self.boost = vocab_size, tuple(orders), mixing, boost
        boundary = -1 if boundary_token is None else boundary_token
        native = backends.native()
        stream = (boundary, document_reset, memory_bytes)
        if mixing == "tilt":
            self._cache = native.HintCache(vocab_size, orders[0], threshold, *stream)
        else:
            number = MIXINGS.index(mixing)
            self._cache = native.NgramCache(vocab_size, list(orders), number, concentration, discount, *stream)

    def score(self, tokens: ArrayLike, base_logprob: ArrayLike, hint_logprob: ArrayLike | None = None) -> Array:
        """Natural log-probabilities of `tokens`, each from the tokens before it; then each is counted.

        Args:
            tokens: (count,) integers, numpy, torch or a list.
            base_logprob: (count,) floats of any width, the model's natural log-probability of each token, -700 to 0.
            hint_logprob: (count,) floats, the model's of what `hints` would give, for "tilt" alone; looked at
                where its gate is open.
        Returns:
            (count,) float64, in nats, at most 0.
        Raises:
            TypeError: what is no integer, or no float.
            ValueError: a shape or number that does not fit; its place is named. A call that raises has changed nothing.
        Example:
            >>> from pgolf import NgramCache
            >>> NgramCache(vocab_size=16, memory_bytes=1 << 22).score([1, 2, 3], [-2.0, -2.0, -2.0]).shape
            (3,)
        """
        tokens = self._tokens(tokens)
        base = _logprobs(base_logprob, "base_logprob", tokens.size)
        if self.mixing == "tilt":
            if hint_logprob is None:
                raise ValueError("hint_logprob: needed with mixing='tilt'; `hints` tells of which tokens")
            of_hints = _logprobs(hint_logprob, "hint_logprob", tokens.size)
            hints, gates = self._hints(tokens)
            return tilt(base, of_hints, hints == tokens, np.where(gates, self.boost, 0.0))
        out = np.empty(tokens.size, np.float64)
        self._cache.score(tokens.ctypes.data, base.ctypes.data, out.ctypes.data, tokens.size)
        return out

    def update(self, tokens: ArrayLike) -> None:
        """Count `tokens` without scoring them; weights learn nothing from it.

        Args:
            tokens: (count,) integers.
        Raises:
            TypeError, ValueError: as `score`.
        Example:
            >>> from pgolf import NgramCache
            >>> cache = NgramCache(vocab_size=16, memory_bytes=1 << 22)
            >>> cache.update([1, 2, 3])
            >>> cache.stats()["tokens"]
            3
        """
        tokens = self._tokens(tokens)
        self._cache.update(tokens.ctypes.data, tokens.size)

    def distribution(self, base_probs: ArrayLike) -> Array:
        """The next token's probabilities, given the model's; the cache does not change.

        By the arithmetic of `score`, so an audit can see that what was booked is part of a whole.

        Args:
            base_probs: (vocab_size,) floats, the model's probabilities, 0 to 1.
        Returns:
            (vocab_size,) float64; they sum to what base_probs sum to.
        Raises:
            TypeError: what is no float.
            ValueError: a shape or number that does not fit; its place is named.
        Example:
            >>> import numpy as np
            >>> from pgolf import NgramCache
            >>> probs = NgramCache(vocab_size=16, memory_bytes=1 << 22).distribution(np.full(16, 1 / 16))
            >>> probs.shape, bool(abs(probs.sum() - 1) < 1e-9)
            ((16,), True)
        """
        base = _floats(base_probs, "base_probs", self.vocab_size)
        _refuse(~((base >= 0) & (base <= 1)), base, "base_probs", "0 to 1")
        if self.mixing == "tilt":
            hint = self._cache.next_hint()
            if hint is None:
                return base.copy()
            lifted = base[hint] * np.exp(self.boost)
            probs = base / (1 - base[hint] + lifted)
            probs[hint] *= np.exp(self.boost)
            return probs
        out = np.empty(self.vocab_size, np.float64)
        self._cache.distribution(base.ctypes.data, out.ctypes.data)
        return out

    def hints(self, tokens: ArrayLike) -> tuple[Array, Array]:
        """For each token, then counted, what most often followed the same context, and whether that is sure enough.
        "tilt" only.

        The hint is what followed the same order - 1 tokens most often, the gate is open where that was in at least
        `threshold` of all cases. Both come from the tokens before.

        Args:
            tokens: (count,) integers.
        Returns:
            The hints (count,) uint16, and their gates (count,) bool.
        Raises:
            TypeError, ValueError: as `score`; ValueError where mixing is not "tilt".
        Example:
            >>> from pgolf import NgramCache
            >>> cache = NgramCache(vocab_size=16, orders=[2], mixing="tilt", memory_bytes=1 << 22)
            >>> hints, gates = cache.hints([1, 2] * 20)
            >>> int(hints[-1]), bool(gates[-1])  # 2 always followed 1
            (2, True)
        """
        _need(self.mixing == "tilt", "mixing", self.mixing, "tilt, for hints")
        return self._hints(self._tokens(tokens))

    def snapshot(self) -> bytes:
        """The whole state, to go back to or to send elsewhere.

        Returns:
            bytes, of about the size of stats()["used_bytes"].
        Raises:
            Nothing.
        Example:
            >>> from pgolf import NgramCache
            >>> cache = NgramCache(vocab_size=16, memory_bytes=1 << 22)
            >>> before = cache.snapshot()
            >>> cache.update([1, 2, 3])
            >>> cache.restore(before)
            >>> cache.stats()["tokens"]
            0
        """
        data: bytes = self._cache.save()
        return data

    def restore(self, snapshot: bytes) -> None:
        """Back to the state of a snapshot that a cache of the same settings made. Meanwhile both states are in memory.

        Anybody may have made the bytes: what is taken can be learned from and makes distributions that sum to one.

        Args:
            snapshot: bytes, of `snapshot`.
        Raises:
            ValueError: a snapshot that is damaged, of a cache with other settings, or of a state that no cache could
                be in; nothing has changed.
        Example:
            >>> from pgolf import NgramCache
            >>> one, other = (NgramCache(vocab_size=16, memory_bytes=1 << 22) for _ in range(2))
            >>> one.update([1, 2, 3])
            >>> other.restore(one.snapshot())
            >>> other.stats() == one.stats()
            True
        """
        data = np.frombuffer(snapshot, np.uint8)
        if not self._cache.load(data.ctypes.data, data.size):
            raise ValueError(f"snapshot: {data.size} bytes that are damaged or of a cache with other settings")

    def stats(self) -> dict[str, int]:
        """What the cache holds, in numbers.

        Returns:
            tokens: counted so far; contexts, successors: kept now; refused_*: events that found no place; used_bytes.
        Raises:
            Nothing.
        Example:
            >>> from pgolf import NgramCache
            >>> NgramCache(vocab_size=16, memory_bytes=1 << 22).stats()["tokens"]
            0
        """
        found: dict[str, int] = self._cache.stats()
        return found

    def _hints(self, tokens: Array) -> tuple[Array, Array]:
        hints, gates = np.empty(tokens.size, np.uint16), np.empty(tokens.size, np.bool_)
        self._cache.hints(tokens.ctypes.data, hints.ctypes.data, gates.ctypes.data, tokens.size)
        return hints, gates

    def _tokens(self, tokens: ArrayLike) -> Array:
        array = _array(tokens)
        if array.size == 0 and array.ndim == 1:
            return np.empty(0, np.uint16)
        if array.dtype.kind not in "iu":
            raise TypeError(f"tokens: {array.dtype}; integers are accepted")
        if array.ndim != 1:
            raise ValueError(f"tokens: shape {array.shape}; one dimension is accepted")
        if array.min() < 0 or array.max() >= self.vocab_size:
            _refuse((array < 0) | (array >= self.vocab_size), array, "tokens", f"0 to {self.vocab_size - 1}")
        return np.ascontiguousarray(array, np.uint16)


def tilt(logp_target: ArrayLike, logp_hint: ArrayLike, is_hint: ArrayLike, beta: float | ArrayLike) -> Array:
    """log of p(x) e^(beta [x is the hint]) / (1 + p(hint) (e^beta - 1)), float64, all (count,).

    The distribution behind it sums to one for every beta; beta 0 changes nothing, so a closed gate is a beta of 0.
    """
    target, hint = (np.asarray(logp, np.float64) for logp in (logp_target, logp_hint))
    lift = np.asarray(beta, np.float64)
    with np.errstate(divide="ignore"):
        log_total = np.log1p(np.exp(hint) * np.expm1(lift))
    return target + np.where(is_hint, lift, 0.0) - np.maximum(log_total, hint + lift)  # of p(hint) = 1 no 1 - 1 is left


def _need(right: bool, name: str, value: object, accepted: str) -> None:
    if not right:
        raise ValueError(f"{name}: {value}; accepted is {accepted}")


def _array(values: ArrayLike) -> Array:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16


def _floats(values: ArrayLike, name: str, count: int) -> Array:
    array = _array(values)
    if array.size and array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: {array.dtype}; floats are accepted")
    if array.shape != (count,):
        raise ValueError(f"{name}: shape {array.shape}; ({count},) is accepted")
    return np.ascontiguousarray(array, np.float64)


def _logprobs(values: ArrayLike, name: str, count: int) -> Array:
    array = _floats(values, name, count)
    if count and not (array.max() <= 0 and array.min() >= LOWEST_LOGPROB):  # NaN fails too
        _refuse(~((array <= 0) & (array >= LOWEST_LOGPROB)), array, name, f"{LOWEST_LOGPROB:g} to 0")
    return array


def _refuse(wrong: Array, values: Array, name: str, accepted: str) -> None:
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{name}[{at}]: {values[at]}; accepted is {accepted}")
