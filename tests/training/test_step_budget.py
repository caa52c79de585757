"""The step budget: when ranks synchronise, what they agree on, and what they estimate until the next time."""

import torch

from pgolf.runtime.clock import Clock, Stopwatch
from pgolf.runtime.ranks import Ranks
from pgolf.training.step_budget import StepBudget

CPU = torch.device("cpu")


def budget(elapsed: float, step_seconds: float, iterations: int, ranks: int = 1) -> StepBudget:
    """At step 20, of a run that may train for 10 seconds."""
    return StepBudget(
        Ranks(0, ranks, CPU), Stopwatch(CPU, elapsed), Clock(elapsed, step_seconds), iterations, limit=10.0, step=20
    )


def test_between_two_synchronisations_the_time_is_estimated():
    b = budget(elapsed=5.0, step_seconds=0.125, iterations=1000)
    assert b.due(20, signalled=False)
    assert b.synchronise(20, diverged=False, signalled=False) == (False, False)
    assert b.steps == 8  # a second of them
    assert [b.due(step, signalled=False) for step in (21, 27, 28)] == [False, False, True]
    assert [b.used(step) for step in (20, 24)] == [0.5, 0.55]
    assert not b.spent(28)


def test_the_iterations_end_it_too():
    b = budget(elapsed=5.0, step_seconds=0.125, iterations=25)
    b.synchronise(20, diverged=False, signalled=False)
    assert b.used(23) == 23 / 25
    assert [b.due(step, signalled=False) for step in (24, 25)] == [False, True]
    assert [b.spent(step) for step in (24, 25)] == [False, True]


def test_no_step_is_begun_that_would_not_end_in_time():
    b = budget(elapsed=9.9, step_seconds=0.125, iterations=1000)
    b.synchronise(20, diverged=False, signalled=False)
    assert b.steps == 0
    assert b.spent(20)


def test_a_signal_is_heard_at_once_where_one_process_is_alone():
    for ranks, at_once in ((1, True), (2, False)):
        b = budget(elapsed=5.0, step_seconds=0.125, iterations=1000, ranks=ranks)
        b.synchronise_at = 28
        assert b.due(21, signalled=True) is at_once
    b = budget(elapsed=5.0, step_seconds=0.125, iterations=1000)
    assert b.synchronise(20, diverged=True, signalled=True) == (True, True)


def test_validation_stops_the_clock():
    b = budget(elapsed=5.0, step_seconds=0.125, iterations=1000)
    b.count(b.watch.mark(), 0.0)
    with b.clock_stopped() as seconds:
        b.watch.begin -= 100.0  # inside, the clock may stand anywhere
    assert not b.marks
    assert 5.0 <= seconds <= b.watch.seconds(b.watch.mark()) < 105.0
