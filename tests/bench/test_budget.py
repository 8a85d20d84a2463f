"""Time budgets."""

import pytest

from dcnv3_tvm.bench.budget import JobBudget, OutOfTimeError, TimeBudget


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


def test_time_budget():
    clock = Clock()
    budget = TimeBudget(60.0, clock)
    clock.now += 45.0
    assert (budget.spent, budget.left) == (45.0, 15.0)


def test_jobs_run_while_the_longest_fits():
    clock = Clock()
    budget = JobBudget(50.0, 10.0, TimeBudget(1000.0, clock))
    assert budget.run(clock.job(20.0)) == 20.0
    assert budget.run(clock.job(5.0)) == 5.0
    # 25 s are left, and the longest job took 20 s.
    assert budget.run(clock.job(7.0)) == 7.0
    with pytest.raises(OutOfTimeError, match="20 s expected, 18 s left"):
        budget.run(clock.job(1.0))


def test_first_job_takes_the_expected_time():
    clock = Clock()
    with pytest.raises(OutOfTimeError, match="60 s expected, 50 s left"):
        JobBudget(50.0, 60.0, TimeBudget(1000.0, clock)).run(clock.job(1.0))


def test_total_budget_is_kept():
    clock = Clock()
    budget = JobBudget(50.0, 10.0, TimeBudget(30.0, clock))
    clock.now += 25.0
    with pytest.raises(OutOfTimeError, match="5 s left"):
        budget.run(clock.job(1.0))


def test_failed_job_counts():
    clock = Clock()
    budget = JobBudget(15.0, 1.0, TimeBudget(1000.0, clock))

    def fail():
        clock.now += 8.0
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        budget.run(fail)
    with pytest.raises(OutOfTimeError, match="8 s expected, 7 s left"):
        budget.run(clock.job(1.0))
