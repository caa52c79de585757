"""The byte budget: equal slopes in a closed loop, with coders made up for it."""

import bisect
import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st

from pgolf.quantization.byte_budget import (
    CLIPS,
    LAST_MOVE,
    MOST_CODINGS,
    MOST_SHRINKINGS,
    Coded,
    Rate,
    choose_clips,
    correct_clips,
    fit,
)


def rates_of(clips, counts, sizes):
    rates = {name: Rate(count) for name, count in counts.items()}
    for name, rate in rates.items():
        rate.learn(clips[name], sizes[name])
    return rates


def test_equal_slopes():
    clips = {"a": 12.0, "b": 12.0, "c": 20.0}
    counts = {"a": 1000, "b": 4000, "c": 2000}
    sizes = {"a": 500, "b": 2000, "c": 1500}
    rises = {"a": 3.0, "b": 8.0, "c": 0.5}
    rates = rates_of(clips, counts, sizes)
    new = choose_clips(clips, rates, rises, wanted=3000.0)
    modelled = {}
    for n in clips:  # ½ log2(1 + s²) bits, s falling as k grows
        square = (4 ** (8 * sizes[n] / counts[n]) - 1) * (clips[n] / new[n]) ** 2
        modelled[n] = counts[n] / 8 * 0.5 * math.log2(1 + square)
        assert modelled[n] == pytest.approx(sizes[n] - counts[n] / 8 * math.log2(new[n] / clips[n]), rel=0.01)
    assert sum(modelled.values()) == pytest.approx(3000, abs=0.01)
    assert all(CLIPS[0] <= each <= CLIPS[1] for each in new.values())
    slopes = {n: rises[n] * (new[n] / clips[n]) ** 2 / counts[n] for n in clips}
    assert slopes["a"] == pytest.approx(slopes["b"]) == pytest.approx(slopes["c"])
    for wanted, end in ((1e9, CLIPS[0]), (-1e9, CLIPS[1])):
        for each in choose_clips(clips, rates, rises, wanted).values():
            assert each == pytest.approx(end)


def test_a_rate_goes_through_all_codings():
    rate = Rate(8000)
    rate.learn(16.0, 3000)
    assert rate.bytes_at(2) == pytest.approx(5000, rel=0.01)  # 1 bit for each halving
    assert rate.doubt == 0
    rate.learn(4.0, 6500)
    assert rate.bytes_at(4) == pytest.approx(3000)
    assert rate.bytes_at(2) == pytest.approx(6500)
    found = [rate.bytes_at(2 + i / 10) for i in range(50)]
    assert found == sorted(found, reverse=True)
    assert rate.doubt == pytest.approx((6500 - 5000) / 2, rel=0.02)
    flat = Rate(8000)
    flat.learn(16.0, 3000)
    flat.learn(32.0, 3000)
    assert flat.bytes_at(7) < 3000 < flat.bytes_at(3)  # never quite level: a wrong guess must lead out of it


def test_the_last_coding_moves_what_is_well_known():
    clips = {"a": 12.0, "b": 12.0}
    rates = rates_of(clips, {"a": 8000, "b": 8000}, {"a": 3000, "b": 3000})
    rates["a"].doubt = 300.0
    new = correct_clips(clips, rates, 30.0, 5900.0)
    assert math.log2(new["a"] / 12) == pytest.approx(math.log2(new["b"] / 12) / 101)
    assert sum(rate.bytes_at(math.log2(new[name])) for name, rate in rates.items()) == pytest.approx(5900)
    far = correct_clips(clips, rates, 30.0, 5200.0)  # `b` alone cannot
    assert far["b"] == pytest.approx(12 * 2**LAST_MOVE)
    assert sum(rate.bytes_at(math.log2(far[name])) for name, rate in rates.items()) == pytest.approx(5200)


def pretend(exponent, excess=1.0):
    """A coder whose bytes follow the steps otherwise than modelled; (code, the clips of each call)."""
    calls = []

    def code(clips):
        calls.append(clips)
        sizes = {n: round(excess * 1e5 * max(0.3, 3.3 - exponent * math.log2(k / 12.85)) / 8) for n, k in clips.items()}
        return Coded(sum(sizes.values()) + 1234, sizes)

    return code, calls


@pytest.mark.parametrize("exponent", [0.8, 0.95, 1.0, 1.2])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, 1.15, 1.3])
def test_the_loop_hits_its_target_in_four_codings(exponent, share):
    clips, counts = {"a": 12.85, "b": 12.85}, {"a": 100_000, "b": 100_000}
    code, calls = pretend(exponent)
    target = round(share * code(clips).total)
    calls.clear()
    found = fit(code, clips, counts, {"a": 1.0, "b": 3.0}, target)
    assert found.codings == len(calls) <= 4
    assert 0.999 * target <= found.total <= target
    assert found.total == code(found.clips).total


def bits_of_a_part(choose, harsh):
    """A made-up tensor's bits a weight by log2 k. Harsh: with a kink, a floor and a top."""
    bits, exponent, start = choose.uniform(2, 5), choose.uniform(0.9, 1.1), math.log2(12.85)
    kink, beyond = choose.uniform(2.2, 6.5), choose.choice([1.0, 0.6, 1.5]) if harsh else 1.0
    least, most = (choose.choice([0.0, 0.1, 0.3]), choose.choice([99.0, 4.5, 6.0])) if harsh else (0.0, 99.0)

    def bits_at(log_k):
        inside = min(log_k, kink) if kink > start else max(log_k, kink)
        y = bits - exponent * (inside - start + beyond * (log_k - inside))
        return min(max(0.5 * math.log2(1 + 4**y), least), most)

    return bits_at


def fit_made_up(seed, harsh):
    """(Fit, target) of a made-up coder: fixed bytes, noise of 0.1%, rises 400 times apart; None if out of reach."""
    choose = random.Random(seed)
    names = "abcdef"[: choose.randint(2, 6)]
    parts = {name: bits_of_a_part(choose, harsh) for name in names}
    counts = {name: choose.randint(4_000, 400_000) for name in names}
    rises = {name: count * 20 ** choose.uniform(-1, 1) for name, count in counts.items()}
    clips = {name: choose.choice([12.85, 20.0]) for name in names}
    fixed, noise, codings = choose.randint(0, sum(counts.values()) // 16), choose.choice([0.0, 5e-4]), []

    def code(clips):
        codings.append(clips)
        sizes = {}
        for name, k in clips.items():
            error = random.Random(f"{seed} {name} {k}").uniform(-noise, noise)
            sizes[name] = round(counts[name] / 8 * parts[name](math.log2(k)) * (1 + error))
        return Coded(fixed + sum(sizes.values()), sizes)

    smallest, largest = (code(dict.fromkeys(names, end)).total for end in reversed(CLIPS))
    target = round(choose.uniform(0.6, 1.3) * code(clips).total)
    if not 1.01 * smallest < target < 0.99 * largest:
        return None
    codings.clear()
    found = fit(code, clips, counts, rises, target)
    assert found.codings == len(codings) <= (MOST_CODINGS + MOST_SHRINKINGS + 1 if harsh else MOST_CODINGS)
    assert found.total == code(found.clips).total <= target
    assert found.fits
    return found, target


@settings_of_test(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_four_codings_reach_the_band(seed):
    fitted = fit_made_up(seed, harsh=False)
    assume(fitted)
    found, target = fitted
    assert 0.995 * target <= found.total <= target


def test_four_codings_mostly_reach_the_band_with_a_coder_of_kinks():
    first = random.SystemRandom().randrange(1 << 32)
    print(f"from seed {first}")
    fitted = [each for each in (fit_made_up(first + i, harsh=True) for i in range(400)) if each]
    reached = sum(found.codings <= MOST_CODINGS and found.total >= 0.995 * target for found, target in fitted)
    assert reached >= 0.95 * len(fitted)  # 98 in 100 do; 88 of a loop with one factor for what was missed


@settings_of_test(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_no_file_is_over_a_target_that_the_largest_steps_meet(seed):
    """A coder as bad as can be: sizes fall by jumps, anywhere, or hardly at all, with noise of up to 3%."""
    choose = random.Random(seed)
    noise = choose.choice([0.0, 1e-3, 0.03])
    counts = {name: choose.randint(100, 400_000) for name in "abcdef"[: choose.randint(1, 6)]}
    jumps = {name: sorted(choose.uniform(1.5, 9.0) for _ in range(choose.randint(0, 6))) for name in counts}
    slopes = {name: choose.choice([0.0, 0.01, 0.5, 1.0, 3.0]) for name in counts}

    def code(clips):
        sizes = {}
        for name, k in clips.items():
            bits = 8 / 2 ** (bisect.bisect(jumps[name], math.log2(k)) + slopes[name] * (math.log2(k) - 2))
            error = random.Random(f"{seed} {name} {k:.9g}").uniform(-noise, noise)
            sizes[name] = round(counts[name] / 8 * bits * (1 + error))
        return Coded(500 + sum(sizes.values()), sizes)

    clips = {name: choose.choice([3.0, 12.85, 20.0, 380.0, 500.0]) for name in counts}
    ends = code(clips).total, code({name: max(k, CLIPS[1]) for name, k in clips.items()}).total
    target = round(min(ends) + choose.choice([0.0, 1e-3, 0.1, 0.5, 0.9]) * abs(ends[0] - ends[1]))
    found = fit(code, clips, counts, {name: choose.uniform(0, 100) for name in counts}, target)
    assert found.fits
    assert found.total == code(found.clips).total <= target
    assert found.codings <= MOST_CODINGS + MOST_SHRINKINGS + 1


def test_a_target_that_cannot_be_met():
    clips, counts = {"a": 12.85}, {"a": 100_000}
    code, _ = pretend(1.0)
    found = fit(code, clips, counts, {"a": 1.0}, 2000)
    assert not found.fits
    assert found.total == code({"a": CLIPS[1]}).total  # the least that can be had
    assert fit(code, clips, counts, {"a": 1.0}, 10**7).total < 10**7  # more than the finest step needs
