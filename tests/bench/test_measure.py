"""Bursts and statistics, with a simulated clock."""

import dataclasses

import pytest

from dcnv3_tvm.bench.measure import Plan, Quartiles, Timing, measure, median_of_bursts


class Clock:
    """A clock that only calls and pauses advance."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.log.append(("sleep", seconds))
        self.now += seconds

    def call(self, name, *durations):
        """Return a call that takes these times in turn, and then the last."""
        left = list(durations)

        def call():
            self.log.append((name, self.now))
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


PLAN = Plan(rounds=2, calls=5, dropped=2, pause=0.25, burst_seconds=1000.0)


def times(clock, plan, **calls):
    return measure(calls, plan, clock=clock, sleep=clock.sleep)


def test_backends_alternate_in_bursts_with_pauses():
    clock, begun = Clock(), []
    measure(
        {"a": clock.call("a", 1.0), "b": clock.call("b", 2.0)},
        PLAN,
        clock=clock,
        sleep=clock.sleep,
        on_round=begun.append,
    )
    burst_a, burst_b = ["sleep", *"aaaaa"], ["sleep", *"bbbbb"]
    assert [name for name, _ in clock.log] == (burst_a + burst_b) * 2
    assert {value for name, value in clock.log if name == "sleep"} == {0.25}
    assert begun == [0, 1]


def test_first_calls_of_a_burst_are_dropped():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1)
    found = times(clock, plan, a=clock.call("a", 90.0, 80.0, 3.0, 4.0, 5.0))["a"]
    assert found.bursts == (pytest.approx((3.0, 4.0, 5.0)),)
    assert found.seconds.median == pytest.approx(4.0)


def test_slow_bursts_end_early_but_after_the_second_call():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1, burst_seconds=10.0)
    found = times(clock, plan, slow=clock.call("slow", 50.0, 60.0))["slow"]
    assert found.bursts == (pytest.approx((60.0,)),)
    found = times(clock, plan, fair=clock.call("fair", 4.0))["fair"]
    assert found.bursts == (pytest.approx((4.0,)),)


def test_outlier_burst_is_repeated_once():
    clock = Clock()
    plan = Plan(rounds=3, calls=1, dropped=0, pause=0.0, outlier=1.5)
    found = times(clock, plan, a=clock.call("a", 1.0, 9.0, 1.0, 7.0))["a"]
    assert found.bursts == tuple(pytest.approx((value,)) for value in (1.0, 7.0, 1.0))
    assert found.redone == 1


def test_call_before_is_not_timed():
    clock = Clock()
    plan = dataclasses.replace(PLAN, rounds=1)
    found = measure(
        {"a": clock.call("a", 2.0), "b": clock.call("b", 2.0)},
        plan,
        clock=clock,
        sleep=clock.sleep,
        before={"b": clock.call("other", 50.0)},
    )
    assert found["a"].bursts == found["b"].bursts == (pytest.approx((2.0,) * 3),)
    assert [name for name, _ in clock.log] == ["sleep", *"aaaaa", "sleep", *["other", "b"] * 5]


def test_short_calls_are_timed_in_long_bursts():
    clock = Clock()
    call = clock.call("a", 50.0, *[2.0] * 31, *[3.0] * 64, *[9.0] * 16, 2.0)
    # Bursts of 1, 2, 4, ... calls until one takes long enough; then three that count.
    found = median_of_bursts(call, seconds=60.0, bursts=3, clock=clock)
    calls = [1, 2, 4, 8, 16, 32]
    assert found == pytest.approx(3.0)
    assert len(clock.log) == sum(calls) + 3 * 32


def test_quartiles():
    found = Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert dataclasses.astuple(found) == (1.0, 2.0, 3.0, 4.0)
    assert dataclasses.astuple(Quartiles.of([7.0])) == (7.0,) * 4
    assert found.scaled(10.0).upper == 40.0


def test_ratio_is_per_round():
    # The machine is ten times slower in the second round, which the ratio cancels.
    ours = Timing(((1.0, 1.0), (10.0, 10.0), (1.0, 1.0)))
    theirs = Timing(((3.0, 3.0), (30.0, 30.0), (3.0, 3.0)))
    assert dataclasses.astuple(theirs.ratio_to(ours)) == (3.0,) * 4
