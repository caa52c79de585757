"""pgolf.NgramCache: equal to its definition, normalised, causal, one result however the stream is cut, bounded."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_reference import Reference

import pgolf
from pgolf import NgramCache
from pgolf.evaluation.ngram_cache import MIXINGS, tilt

CHAINS = ("adaptive", "dirichlet", "pyp")
SMALL = 1 << 20  # bytes, and a megabyte more for a vocabulary of 65,536


def uniform(count, vocab_size):
    return np.full(count, -math.log(vocab_size))


def random_base(rng, count):
    return np.log(rng.uniform(1e-6, 1.0, count))


def repetitive(rng, count, vocab_size):
    """Random phrases that come back, with some noise."""
    phrases = [rng.integers(vocab_size, size=rng.integers(5, 30)) for _ in range(8)]
    parts = [
        phrases[rng.integers(8)] if rng.random() < 0.8 else rng.integers(vocab_size, size=3) for _ in range(count // 3)
    ]
    return np.concatenate(parts)[:count]


STREAMS = {
    "phrases": lambda rng: (repetitive(rng, 1500, 50), 50),
    "random": lambda rng: (rng.integers(5, size=800), 5),
    "one token": lambda rng: (np.zeros(600, int), 1),
    "one token of many": lambda rng: (np.full(600, 65535), 65536),
    "all distinct": lambda rng: (rng.permutation(65536)[:800], 65536),
    "period 2": lambda rng: (np.arange(600) % 2, 2),
    "two tokens": lambda rng: (rng.integers(2, size=800), 2),
    "one changes": lambda rng: (np.r_[np.zeros(300, int), 1, np.zeros(300, int)], 2),
    "empty": lambda rng: (np.zeros(0, int), 7),
    "single": lambda rng: (np.array([3]), 7),
}


def assert_equals_reference(reference, cache, tokens, base, cut):
    expected = [reference.score(int(token), math.exp(p)) for token, p in zip(tokens, base, strict=True)]
    parts = [(tokens[a:b], base[a:b]) for a, b in zip([0, *cut], [*cut, len(tokens)], strict=True)]
    found = np.concatenate([cache.score(*part) for part in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixing", CHAINS)
@pytest.mark.parametrize("name", STREAMS)
def test_scores_are_those_of_the_definition(rng, name, mixing):
    tokens, vocab_size = STREAMS[name](rng)
    cut = sorted(rng.integers(len(tokens) + 1, size=3))
    cache = NgramCache(vocab_size, mixing=mixing, memory_bytes=2 * SMALL, concentration=5.0)
    reference = Reference(mixing=mixing, a=5.0)
    assert_equals_reference(reference, cache, tokens, random_base(rng, len(tokens)), cut)
    assert cache.stats()["refused_contexts"] == cache.stats()["refused_successors"] == 0
    assert cache.stats()["tokens"] == len(tokens)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    orders=st.sets(st.integers(2, 16), min_size=1, max_size=5),
    mixing=st.sampled_from(CHAINS),
    boundary=st.sampled_from([None, 0]),
    reset=st.booleans(),
)
def test_any_orders_boundaries_and_cuts(tokens, cuts, orders, mixing, boundary, reset):
    reset = reset and boundary is not None
    cache = NgramCache(
        4, sorted(orders), mixing, memory_bytes=SMALL, boundary_token=boundary, document_reset=reset, concentration=2.0
    )
    reference = Reference(sorted(orders), mixing, a=2.0, boundary=boundary, reset=reset)
    base = np.log(np.linspace(0.1, 0.9, len(tokens)))
    cut = sorted(min(each, len(tokens)) for each in cuts)
    assert_equals_reference(reference, cache, np.array(tokens, int), base, cut)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=80),
    cut=st.integers(0, 80),
    order=st.integers(2, 16),
    boundary=st.sampled_from([None, 0]),
    reset=st.booleans(),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_hints_are_those_of_the_definition(tokens, cut, order, boundary, reset, threshold):
    reset = reset and boundary is not None
    cache = NgramCache(3, [order], "tilt", SMALL, document_reset=reset, boundary_token=boundary, threshold=threshold)
    reference = Reference([order], "tilt", boundary=boundary, reset=reset, threshold=threshold)
    expected = []
    for token in tokens:
        expected.append(reference.hint())
        reference.update(token)
    stream = np.array(tokens, np.int64)
    found = [cache.hints(stream[:cut]), cache.hints(stream[cut:])]
    hints, gates = (np.concatenate(each) for each in zip(*found, strict=True))
    assert list(zip(hints.tolist(), gates.tolist(), strict=True)) == expected


@pytest.mark.parametrize("mixing", MIXINGS)
def test_distributions_sum_to_one_and_are_what_is_scored(rng, mixing):
    """10,000 states: each the stream so far, a base of its own, and the token that then comes."""
    vocab_size, states = 20, 10_000
    cache = NgramCache(vocab_size, [4] if mixing == "tilt" else None, mixing, SMALL, concentration=3.0)
    twin = NgramCache(vocab_size, [4], "tilt", SMALL)
    tokens = repetitive(rng, states, vocab_size)
    bases = rng.dirichlet(np.full(vocab_size, 0.3), states)
    bases = np.maximum(bases, 1e-12) / np.maximum(bases, 1e-12).sum(1, keepdims=True)
    lifted = 0
    for token, base in zip(tokens, bases, strict=True):
        probs = cache.distribution(base)
        assert abs(math.fsum(probs) - math.fsum(base)) < 1e-9
        assert probs.min() >= 0
        hint = twin.hints([token])[0]
        extra = [np.log(base[hint])] if mixing == "tilt" else []
        (logprob,) = cache.score([token], [math.log(base[token])], *extra)
        assert abs(logprob - math.log(probs[token])) < 1e-12
        lifted += probs[token] > 2 * base[token]
    assert lifted > states / 20


@pytest.mark.parametrize("mixing", CHAINS)
def test_the_future_changes_nothing(rng, mixing):
    tokens, base = repetitive(rng, 3000, 300), random_base(rng, 3000)
    at = int(rng.integers(1, 2999))
    changed = np.r_[tokens[:at], rng.integers(300, size=3000 - at)]
    first = NgramCache(300, mixing=mixing, memory_bytes=SMALL).score(tokens, base)
    second = NgramCache(300, mixing=mixing, memory_bytes=SMALL).score(changed, np.r_[base[:at], base[at:] / 2])
    assert first[:at].tobytes() == second[:at].tobytes()
    assert first[at:].tobytes() != second[at:].tobytes()


def test_the_future_changes_no_hint(rng):
    tokens = repetitive(rng, 3000, 300)
    at = int(rng.integers(1, 2999))
    changed = np.r_[tokens[:at], rng.integers(300, size=3000 - at)]
    hints = [NgramCache(300, [5], "tilt", SMALL).hints(stream) for stream in (tokens, changed)]
    for one, other in zip(*hints, strict=True):
        assert one[: at + 1].tobytes() == other[: at + 1].tobytes()  # the hint at a position is older than its token


@pytest.mark.parametrize("memory_bytes", [1 << 17, 1 << 24])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_cuts_and_snapshots_change_nothing(rng, mixing, memory_bytes):
    count = 40_000  # more than two of the blocks that the stream is worked on in, more than the small memory holds
    tokens, base = repetitive(rng, count, 900), random_base(rng, count)
    hint_logprob = [random_base(rng, count)] if mixing == "tilt" else []
    orders = [6] if mixing == "tilt" else None

    def fresh():
        return NgramCache(900, orders, mixing, memory_bytes)

    whole = fresh()
    expected = whole.score(tokens, base, *hint_logprob)
    cuts = [0, *sorted(rng.integers(count, size=8)), count]
    cut, found = fresh(), []
    for begin, end in itertools.pairwise(cuts):
        found.append(cut.score(tokens[begin:end], base[begin:end], *(each[begin:end] for each in hint_logprob)))
        snapshot, cut = cut.snapshot(), fresh()
        cut.update(tokens[:100])  # to be forgotten
        cut.restore(snapshot)
    assert np.concatenate(found).tobytes() == expected.tobytes()
    assert cut.stats() == whole.stats()
    assert cut.snapshot() == whole.snapshot()
    assert (whole.stats()["refused_contexts"] > 0) == (memory_bytes < 1 << 20)


@pytest.mark.parametrize("mixing", CHAINS)
def test_a_full_cache_stays_a_probability(rng, mixing):
    cache = NgramCache(50, mixing=mixing, memory_bytes=70_000)
    base = rng.dirichlet(np.ones(50))
    for _ in range(20):
        cache.update(rng.integers(50, size=2000))
        assert abs(cache.distribution(base).sum() - 1) < 1e-9
    stats = cache.stats()
    assert stats["refused_contexts"] > 0
    assert stats["refused_successors"] > 0
    assert stats["used_bytes"] <= 70_000


@pytest.mark.parametrize("mixing", MIXINGS)
def test_counts_stop_together(rng, mixing):
    tokens = (rng.random(70_000) < 0.1).astype(int)  # one context passes 65535 of them, with two successors
    tokens[:66_000] = 0
    tokens[[100, 200, 300]] = 1
    orders = [2]
    reference = Reference(orders, mixing, a=2.0)
    cache = NgramCache(2, orders, mixing, SMALL, concentration=2.0)
    cache.update(tokens)
    for token in tokens:
        reference.update(int(token))
    assert reference.counts[(0,)].total() == 65535
    cache.update([0])
    reference.update(0)
    base = np.array([0.25, 0.75])
    if mixing == "tilt":
        (hint,), (gate,) = cache.hints([1])
        assert (hint, gate) == reference.hint()
        return
    expected = [reference.probability(base[token], token) for token in (0, 1)]
    np.testing.assert_allclose(cache.distribution(base), expected, rtol=1e-12)


def test_where_the_cache_knows_nothing_it_costs_nothing(rng):
    """Bits a token; a byte is a third of one or less, and accepted are 0.0005 bits a byte."""
    count, vocab_size = 200_000, 1024
    tokens, base = rng.integers(vocab_size, size=count), uniform(count, vocab_size)
    cost = NgramCache(vocab_size, memory_bytes=1 << 24).score(tokens, base).mean() - base.mean()
    assert -cost / math.log(2) < 0.0005
    certain = np.full(count, math.log(0.999))  # a base that knows it all, on a stream that repeats misleadingly
    cost = NgramCache(8, memory_bytes=1 << 24).score(tokens % 8, certain).mean() - certain.mean()
    assert -cost / math.log(2) < 0.0005


def test_what_repeats_is_learned(rng):
    phrase = rng.integers(1024, size=500)
    logprob = NgramCache(1024, memory_bytes=SMALL).score(np.tile(phrase, 6), uniform(3000, 1024))
    assert -logprob[:500].mean() > 0.99 * math.log(1024)
    assert -logprob[1000:].mean() < 0.2 * math.log(1024)


@pytest.mark.parametrize("mixing", CHAINS)
def test_what_is_all_but_impossible_has_a_finite_cost(mixing):
    """Every level multiplies the base's probability, and it can be the least that a float64 holds already."""
    for concentration in (1e-300, None, 1e300):
        cache = NgramCache(3, range(2, 17), mixing, memory_bytes=1 << 22, concentration=concentration, discount=0.0)
        cache.update(np.zeros(5000, int))
        (logprob,) = cache.score([2], [-700.0])
        assert -math.inf < logprob < -650
        cache.update(np.zeros(5000, int))
        total = cache.distribution([1.0, 0.0, math.exp(-700.0)]).sum()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_tilt_against_a_hint_that_is_certain():
    for boost in (-50.0, -40.0, -1.0, 0.0, 50.0):
        assert tilt([0.0], [0.0], [True], boost)[0] == pytest.approx(0.0, abs=1e-12)
        assert -800 < tilt([-700.0], [0.0], [False], boost)[0] < -600
        cache = NgramCache(4, [2], "tilt", memory_bytes=1 << 22, boost=boost)
        cache.update([1, 2] * 20 + [1])
        np.testing.assert_allclose(cache.distribution([0.0, 0.0, 1.0, 0.0]), [0.0, 0.0, 1.0, 0.0], atol=1e-12)


def test_tilt_is_a_distribution(rng):
    base = rng.dirichlet(np.full(30, 0.5), 200)
    hint = rng.integers(30, size=200)
    beta = rng.choice([0.0, 2.625, -1.0, 12.0], 200)
    of_hint = np.log(base[np.arange(200), hint])
    logprobs = [tilt(np.log(base[:, token]), of_hint, hint == token, beta) for token in range(30)]
    np.testing.assert_allclose(np.exp(logprobs).sum(0), 1.0, rtol=1e-12)
    assert np.array_equal(np.transpose(logprobs)[beta == 0], np.log(base)[beta == 0])


def test_arrays_tensors_and_lists_are_the_same(rng):
    tokens, base = rng.integers(9, size=200), random_base(rng, 200)
    expected = NgramCache(9, memory_bytes=SMALL).score(tokens, base)
    for convert in (
        list,
        torch.from_numpy,
        lambda each: np.repeat(each, 2)[::2],
        lambda each: torch.tensor(each)[None][0],
    ):
        assert np.array_equal(NgramCache(9, memory_bytes=SMALL).score(convert(tokens), convert(base)), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):  # exact: every one of their numbers is a float64
        given = torch.from_numpy(base).to(dtype)
        expected = NgramCache(9, memory_bytes=SMALL).score(tokens, given.double())
        assert np.array_equal(NgramCache(9, memory_bytes=SMALL).score(tokens, given), expected)
        probs, cache = torch.full((9,), 1 / 9, dtype=dtype), NgramCache(9, memory_bytes=SMALL)
        assert np.array_equal(cache.distribution(probs), probs.double().numpy())
    with pytest.raises(TypeError, match="tokens: float64; integers are accepted"):
        NgramCache(9, memory_bytes=SMALL).update(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="base_logprob: complex64; floats are accepted"):
        NgramCache(9, memory_bytes=SMALL).score([1], torch.ones(1, dtype=torch.complex64))
    narrow = NgramCache(9, memory_bytes=SMALL).score(tokens.astype(np.uint8), base.astype(np.float32))
    np.testing.assert_allclose(narrow, expected, rtol=1e-5)


def test_threads_take_turns(rng):
    cache, tokens = NgramCache(100, memory_bytes=1 << 24), repetitive(rng, 20_000, 100)
    threads = [threading.Thread(target=lambda: [cache.update(tokens) for _ in range(3)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.stats()["tokens"] == 12 * 20_000


BAD_SETTINGS = [
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 65537}, "vocab_size is 65537"),
    ({"mixing": "best"}, "mixing: best"),
    ({"orders": []}, "orders"),
    ({"orders": [1, 2]}, "orders"),
    ({"orders": [3, 2]}, "orders"),
    ({"orders": [2, 17]}, "orders"),
    ({"orders": [2, 3], "mixing": "tilt"}, "one order"),
    ({"memory_bytes": 1000}, "memory_bytes is 1000"),
    ({"memory_bytes": 1 << 40}, "memory_bytes is"),
    ({"document_reset": True}, "boundary_token"),
    ({"boundary_token": 10}, "boundary is 10"),
    ({"discount": 1.0}, "discount: 1.0"),
    ({"concentration": math.nan}, "concentration: nan"),
    ({"threshold": 0.0}, "threshold: 0.0"),
]


@pytest.mark.parametrize(("given", "named"), BAD_SETTINGS, ids=[named for _, named in BAD_SETTINGS])
def test_bad_settings_are_named(given, named):
    with pytest.raises(ValueError, match=named):
        NgramCache(**{"vocab_size": 10, "memory_bytes": SMALL, **given})


@pytest.mark.parametrize("mixing", MIXINGS)
def test_bad_input_is_named_with_its_position_and_changes_nothing(mixing):
    cache = NgramCache(10, mixing=mixing, memory_bytes=SMALL)
    cache.update([1, 2, 3])
    before = cache.snapshot()
    extra = [[-1.0, -1.0, -1.0]] if mixing == "tilt" else []
    good = [-1.0, -1.0, -1.0]
    for tokens, base, named in [
        ([1, 10, 2], good, r"tokens\[1\]: 10; accepted is 0 to 9"),
        ([1, 2, -1], good, r"tokens\[2\]: -1"),
        ([1, 2], good, r"base_logprob: shape \(3,\)"),
        ([[1], [2]], good, r"tokens: shape \(2, 1\)"),
        ([1, 2, 3], [-1.0, math.nan, -1.0], r"base_logprob\[1\]: nan"),
        ([1, 2, 3], [-1.0, -1.0, 0.1], r"base_logprob\[2\]: 0.1"),
        ([1, 2, 3], [-math.inf, -1.0, -1.0], r"base_logprob\[0\]: -inf"),
        ([1, 2, 3], [-701.0, -1.0, -1.0], r"base_logprob\[0\]: -701.0; accepted is -700 to 0"),
    ]:
        with pytest.raises(ValueError, match=named):
            cache.score(tokens, base, *extra)
    with pytest.raises(TypeError, match="tokens: float64"):
        cache.update([1.0])
    with pytest.raises(ValueError, match=r"base_probs\[3\]: nan"):
        cache.distribution([0.1] * 3 + [math.nan] + [0.1] * 6)
    with pytest.raises(ValueError, match=r"base_probs: shape \(9,\)"):
        cache.distribution([0.1] * 9)
    if mixing == "tilt":
        with pytest.raises(ValueError, match="hint_logprob: needed"):
            cache.score([1], [-1.0])
        with pytest.raises(ValueError, match=r"hint_logprob\[0\]"):
            cache.score([1], [-1.0], [0.5])
    else:
        with pytest.raises(ValueError, match="mixing"):
            cache.hints([1])
    assert cache.snapshot() == before


def test_it_is_exported():
    assert pgolf.NgramCache is NgramCache
    assert "NgramCache" in pgolf.__all__
