"""Measurer: parallel devices, retries and timeouts."""

from dcnv3_tvm.tuning.tasks import Candidate
from helpers import simulated_runner


def defaults(tasks):
    return [Candidate(task, task.default) for task in tasks]


def test_devices_measure_in_parallel(simulated, tasks):
    # A measurement returns only after three others have started.
    with simulated(size=4, group=4, retries=1) as measurer:
        results = list(measurer.measure(defaults(4 * tasks)))
    assert sorted(number for number, _ in results) == list(range(8))
    assert not any(result.error for _, result in results)


def test_failed_measurement_is_retried(tasks, simulated, tmp_path):
    always = dict.fromkeys(range(99), simulated_runner.FAIL)
    with simulated(faults=always, retries=2) as measurer:
        ((number, result),) = measurer.measure(defaults(tasks[:1]))
    assert (number, result.error) == (0, "RuntimeError: the device failed")
    assert len((tmp_path / "measurements").read_bytes()) == 3


def test_hanging_measurement_is_killed(tasks, simulated):
    with simulated(faults={0: simulated_runner.HANG}, timeout=0.1) as measurer:
        ((_, result),) = measurer.measure(defaults(tasks[:1]))
    assert result.error == "took more than 0.1 s"
