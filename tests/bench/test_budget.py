"""What does not fit into the time is not begun."""

import pytest

from dcnv3_tvm.bench.budget import Allowance, Budget, NoTimeError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def job(self, seconds):
        def run():
            self.now += seconds
            return seconds

        return run


def test_budget_runs_with_the_clock():
    clock = Clock()
    budget = Budget(60.0, clock)
    clock.now += 45.0
    assert (budget.spent, budget.left) == (45.0, 15.0)


def test_jobs_are_begun_while_the_longest_still_fits():
    clock = Clock()
    allowance = Allowance(50.0, 10.0, Budget(1000.0, clock), clock)
    assert allowance.do(clock.job(20.0)) == 20.0
    assert allowance.do(clock.job(5.0)) == 5.0
    # 25 are left, and the longest took 20.
    assert allowance.do(clock.job(7.0)) == 7.0
    with pytest.raises(NoTimeError, match="20 s expected, 18 s left"):
        allowance.do(clock.job(1.0))


def test_the_first_is_taken_to_need_what_is_expected():
    clock = Clock()
    with pytest.raises(NoTimeError, match="60 s expected, 50 s left"):
        Allowance(50.0, 60.0, Budget(1000.0, clock), clock).do(clock.job(1.0))


def test_the_whole_must_hold_too():
    clock = Clock()
    allowance = Allowance(50.0, 10.0, Budget(30.0, clock), clock)
    clock.now += 25.0
    with pytest.raises(NoTimeError, match="5 s left"):
        allowance.do(clock.job(1.0))


def test_a_job_that_fails_has_taken_its_time():
    clock = Clock()
    allowance = Allowance(15.0, 1.0, Budget(1000.0, clock), clock)

    def fail():
        clock.now += 8.0
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        allowance.do(fail)
    with pytest.raises(NoTimeError, match="8 s expected, 7 s left"):
        allowance.do(clock.job(1.0))
