"""Processes that crash, hang and fail, and what that costs."""

import functools
import os
import signal
import time
from multiprocessing import reduction

import pytest

from dcnv3_tvm.tuning.pool import Pool


def outcomes(pool, jobs, timeout=20.0):
    found = dict(pool.run(jobs, timeout=timeout))
    assert sorted(found) == list(range(len(jobs)))
    return [found[number] for number in sorted(found)]


def double(number):
    return functools.partial(int.__mul__, 2, number)


@pytest.mark.parametrize("fresh", [True, False])
def test_jobs_are_done(fresh):
    with Pool(2, fresh=fresh) as pool:
        assert [found.value for found in outcomes(pool, map_list(9))] == [
            2 * number for number in range(9)
        ]


def map_list(count):
    return [double(number) for number in range(count)]


@pytest.mark.parametrize("fresh", [True, False])
def test_processes_are_kept_or_not(fresh):
    with Pool(1, fresh=fresh) as pool:
        first, second = (found.value for found in outcomes(pool, [os.getpid, os.getpid]))
    assert (first == second) != fresh


def test_a_process_in_which_a_job_failed_is_replaced():
    with Pool(1, fresh=False) as pool:
        first, _, second = outcomes(pool, [os.getpid, functools.partial(int, "x"), os.getpid])
    assert first.value != second.value


def test_what_fails_costs_itself_alone():
    jobs = [
        double(1),
        functools.partial(os._exit, 3),
        os.abort,
        functools.partial(time.sleep, 60),
        functools.partial(int, "x"),
        double(2),
    ]
    with Pool(2, fresh=False) as pool:
        start = time.monotonic()
        found = outcomes(pool, jobs, timeout=3.0)
        assert time.monotonic() - start < 30
    assert [one.error for one in found] == [
        "",
        "ended by itself (exit code 3)",
        "crashed (SIGABRT)",
        "took more than 3 s",
        "ValueError: invalid literal for int() with base 10: 'x'",
        "",
    ]
    assert (found[0].value, found[-1].value) == (2, 4)


def test_a_run_that_was_broken_off_leaves_nothing_behind():
    with Pool(2, fresh=False) as pool:
        for _number, _outcome in pool.run(
            [double(1), functools.partial(time.sleep, 60)], timeout=99
        ):
            break
        assert [found.value for found in outcomes(pool, map_list(4))] == [0, 2, 4, 6]


def test_jobs_are_taken_when_there_is_room():
    taken = []

    def jobs():
        for number in range(6):
            taken.append(number)
            yield double(number)

    with Pool(2, fresh=True) as pool:
        run = pool.run(jobs(), timeout=20)
        next(run)
        assert len(taken) <= 4
        assert len(list(run)) == 5


def test_ctrl_c_waits_until_a_process_is_there(monkeypatch, capfd):
    send = reduction.sendfds

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        send(*arguments)

    with Pool(1, fresh=True) as pool:
        monkeypatch.setattr(reduction, "sendfds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outcomes(pool, [double(1)])
        monkeypatch.undo()
        assert outcomes(pool, [double(2)])[0].value == 4
    assert capfd.readouterr().err == ""
