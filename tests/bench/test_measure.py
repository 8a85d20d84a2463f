"""Bursts and statistics, on contestants that only move a clock."""

import dataclasses

import pytest

from dcnv3_tvm.bench.measure import Plan, Quartiles, Timing, measure, median_of_bursts


class Clock:
    """Time that passes only where a contestant or a pause says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.log.append(("sleep", seconds))
        self.now += seconds

    def contestant(self, name, *durations):
        """Take these times by turns, the last for ever."""
        left = list(durations)

        def call():
            self.log.append((name, self.now))
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


PLAN = Plan(rounds=2, calls=5, dropped=2, pause=0.25, burst_seconds=1000.0)


def times(clock, plan, **contestants):
    return measure(contestants, plan, clock=clock, sleep=clock.sleep)


def test_contestants_take_turns_in_bursts_with_pauses():
    clock, begun = Clock(), []
    measure(
        {"a": clock.contestant("a", 1.0), "b": clock.contestant("b", 2.0)},
        PLAN,
        clock=clock,
        sleep=clock.sleep,
        on_round=begun.append,
    )
    burst_a, burst_b = ["sleep", *"aaaaa"], ["sleep", *"bbbbb"]
    assert [name for name, _ in clock.log] == (burst_a + burst_b) * 2
    assert {value for name, value in clock.log if name == "sleep"} == {0.25}
    assert begun == [0, 1]


def test_first_calls_of_a_burst_do_not_count():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1)
    found = times(clock, plan, a=clock.contestant("a", 90.0, 80.0, 3.0, 4.0, 5.0))["a"]
    assert found.bursts == (pytest.approx((3.0, 4.0, 5.0)),)
    assert found.seconds.median == pytest.approx(4.0)


def test_slow_bursts_end_early_but_not_before_the_second_call():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1, burst_seconds=10.0)
    found = times(clock, plan, slow=clock.contestant("slow", 50.0, 60.0))["slow"]
    assert found.bursts == (pytest.approx((60.0,)),)
    found = times(clock, plan, fair=clock.contestant("fair", 4.0))["fair"]
    assert found.bursts == (pytest.approx((4.0,)),)


def test_a_disturbed_burst_is_taken_once_more_whatever_comes():
    clock = Clock()
    plan = Plan(rounds=3, calls=1, dropped=0, pause=0.0, outlier=1.5)
    found = times(clock, plan, a=clock.contestant("a", 1.0, 9.0, 1.0, 7.0))["a"]
    assert found.bursts == tuple(pytest.approx((value,)) for value in (1.0, 7.0, 1.0))
    assert found.redone == 1


def test_what_stands_before_a_call_is_not_timed():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1)
    found = measure(
        {"a": clock.contestant("a", 2.0), "b": clock.contestant("b", 2.0)},
        plan,
        clock=clock,
        sleep=clock.sleep,
        before={"b": clock.contestant("other", 50.0)},
    )
    assert found["a"].bursts == found["b"].bursts == (pytest.approx((2.0,) * 3),)
    assert [name for name, _ in clock.log] == ["sleep", *"aaaaa", "sleep", *["other", "b"] * 5]


def test_short_calls_are_timed_many_at_once():
    clock = Clock()
    call = clock.contestant("a", 50.0, *[2.0] * 31, *[3.0] * 64, *[9.0] * 16, 2.0)
    # Bursts of 1, then 2, 4, ... calls until one takes long enough; then three that count.
    found = median_of_bursts(call, seconds=60.0, bursts=3, clock=clock)
    calls = [1, 2, 4, 8, 16, 32]
    assert found == pytest.approx(3.0)
    assert len(clock.log) == sum(calls) + 3 * 32


def test_quartiles():
    found = Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert dataclasses.astuple(found) == (1.0, 2.0, 3.0, 4.0)
    assert dataclasses.astuple(Quartiles.of([7.0])) == (7.0,) * 4
    assert found.scaled(10.0).upper == 40.0


def test_ratio_is_taken_round_by_round():
    # The machine slowed down by ten between the rounds; the ratio does not see it.
    ours = Timing(((1.0, 1.0), (10.0, 10.0), (1.0, 1.0)))
    theirs = Timing(((3.0, 3.0), (30.0, 30.0), (3.0, 3.0)))
    assert dataclasses.astuple(theirs.ratio_to(ours)) == (3.0,) * 4
