"""Process pool: crashes, timeouts and exceptions affect only their own job."""

import functools
import os
import signal
from multiprocessing import reduction

import pytest

from dcnv3_tvm.tuning.process_pool import ProcessPool


def run_all(pool, jobs, timeout=600.0):
    results = dict(pool.run(jobs, timeout=timeout))
    assert sorted(results) == list(range(len(jobs)))
    return [results[number] for number in sorted(results)]


def double(number):
    return functools.partial(int.__mul__, 2, number)


def values(results):
    return [result.value for result in results]


@pytest.mark.parametrize("fresh", [True, False])
def test_jobs_return_values(fresh):
    with ProcessPool(2, fresh=fresh) as pool:
        results = run_all(pool, [double(number) for number in range(9)])
    assert values(results) == [2 * number for number in range(9)]


@pytest.mark.parametrize("fresh", [True, False])
def test_processes_are_reused_unless_fresh(fresh):
    with ProcessPool(1, fresh=fresh) as pool:
        first, second = values(run_all(pool, [os.getpid, os.getpid]))
    assert (first == second) != fresh


def test_process_of_failed_job_is_replaced():
    with ProcessPool(1, fresh=False) as pool:
        first, _, second = run_all(pool, [os.getpid, functools.partial(int, "x"), os.getpid])
    assert first.value != second.value


def test_failed_job_affects_no_other():
    jobs = [
        double(1),
        functools.partial(os._exit, 3),
        os.abort,
        functools.partial(int, "x"),
        double(2),
    ]
    with ProcessPool(2, fresh=False) as pool:
        results = run_all(pool, jobs)
    assert [result.error for result in results] == [
        "",
        "exited with code 3",
        "crashed (SIGABRT)",
        "ValueError: invalid literal for int() with base 10: 'x'",
        "",
    ]
    assert (results[0].value, results[-1].value) == (2, 4)


def test_hanging_job_is_killed_after_timeout():
    with ProcessPool(1, fresh=False) as pool:
        (hung,) = run_all(pool, [signal.pause], timeout=0.1)
        (next_one,) = run_all(pool, [double(1)])
    assert hung.error == "took more than 0.1 s"
    assert next_one.value == 2


def test_abandoned_run_does_not_block_next():
    with ProcessPool(2, fresh=False) as pool:
        next(pool.run([double(1), signal.pause], timeout=3600))
        assert values(run_all(pool, [double(number) for number in range(4)])) == [0, 2, 4, 6]


def test_jobs_are_consumed_lazily():
    taken = []

    def jobs():
        for number in range(6):
            taken.append(number)
            yield double(number)

    with ProcessPool(2, fresh=True) as pool:
        run = pool.run(jobs(), timeout=600)
        next(run)
        assert len(taken) <= 4
        assert len(list(run)) == 5


def test_ctrl_c_during_fork_request_is_deferred(monkeypatch, capfd):
    send = reduction.sendfds

    def send_interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        send(*arguments)

    # A shell that starts the tests in the background makes them ignore SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ProcessPool(1, fresh=True) as pool:
            monkeypatch.setattr(reduction, "sendfds", send_interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_all(pool, [double(1)])
            monkeypatch.undo()
            assert values(run_all(pool, [double(2)])) == [4]
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert capfd.readouterr().err == ""
