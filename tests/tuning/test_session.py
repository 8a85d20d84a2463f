"""Sessions on devices that are not real: what they try, keep, resume and survive."""

import json
import threading
import time

import pytest

from dcnv3_tvm.schedules.records import Records, RecordsError
from dcnv3_tvm.tuning.journal import SessionError
from dcnv3_tvm.tuning.laboratory import Candidate
from dcnv3_tvm.tuning.summary import summarize, write_summary
from helpers import simulated_device as faults


def test_a_session_tries_all_and_keeps_the_best(session, simulated, tasks, lines):
    run = session(100)
    with simulated() as laboratory:
        records = run.run(laboratory)
    assert run.trials == 24 == len(lines())
    assert Records.read(run.directory / "records") == records
    assert set(records.by_workload) == {task.workload for task in tasks}
    first = [json.loads(line) for line in lines()[:2]]
    # What is compiled first is measured first.
    assert {entry["workload"]: entry["decisions"] for entry in first} == {
        task.workload: task.default for task in tasks
    }
    # Each measurement of the pretended device is faster than the one before.
    for record in records.by_workload.values():
        assert record.seconds < record.default_seconds
    assert records.about.trials == 24


def test_the_budget_is_kept_and_spent_on_what_takes_longest(session, simulated, tasks):
    run = session(16)
    run.states[1].task = tasks[1].__class__(**{**vars(tasks[1]), "calls": 50})
    with simulated() as laboratory:
        run.run(laboratory)
    assert run.trials == 16
    assert run.states[1].trials > run.states[0].trials


def test_a_session_is_taken_up_again(session, simulated, lines):
    with simulated() as laboratory:
        session(10).run(laboratory)
        before = lines()
        again = session(14)
        again.run(laboratory)
    assert again.trials == 14
    assert lines()[:10] == before[:10]
    assert (
        len(
            {
                json.dumps([json.loads(line)[k] for k in ("workload", "decisions")])
                for line in lines()
            }
        )
        == 14
    )


def test_nothing_is_left_to_try(session, simulated, lines):
    with simulated() as laboratory:
        session(100).run(laboratory)
        session(100).run(laboratory)
    assert len(lines()) == 24


def test_what_crashes_hangs_or_fails_costs_itself_alone(session, simulated, lines):
    broken = {3: faults.CRASH, 5: faults.HANG, 8: faults.FAIL}
    run = session(100)
    with simulated(faults=broken, timeout=1.5) as laboratory:
        records = run.run(laboratory)
    errors = [error for line in lines() if (error := json.loads(line)["error"])]
    assert sorted(errors) == [
        "RuntimeError: the device says no",
        "crashed (SIGSEGV)",
        "took more than 1.5 s",
    ]
    assert sum(state.failed for state in run.states) == 3
    assert len(records.by_workload) == 2


def test_lost_devices_lose_no_trial(session, simulated, lines):
    broken = dict.fromkeys((2, 3, 7, 11), faults.CRASH)
    with simulated(faults=broken, count=2, retries=2) as laboratory:
        session(100).run(laboratory)
    assert len(lines()) == 24
    assert not any(json.loads(line)["error"] for line in lines())


def test_a_device_that_stays_lost_is_tried_twice_more(tasks, simulated, tmp_path):
    always = dict.fromkeys(range(99), faults.FAIL)
    with simulated(faults=always, retries=2) as laboratory:
        ((number, outcome),) = laboratory.measure([Candidate(tasks[0], tasks[0].default)])
    assert (number, outcome.error) == (0, "RuntimeError: the device says no")
    assert len((tmp_path / "measurements").read_bytes()) == 3


def test_a_wrong_schedule_does_not_enter_the_records(session, simulated, tasks, lines):
    with simulated(wrong="its result is off by 1e-1") as laboratory:
        records = session(100).run(laboratory)
    assert [record.decisions for record in records.by_workload.values()] == [
        task.default for task in tasks
    ]
    assert any("off by 1e-1" in json.loads(line)["error"] for line in lines())


def test_a_full_disk_ends_the_session_and_blames_no_schedule(session, simulated, lines):
    with (
        simulated(faults={5: faults.FULL}) as laboratory,
        pytest.raises(SessionError, match=r"no room for compiled schedules; .*No space left"),
    ):
        session(100).run(laboratory)
    kept = lines()
    assert len(kept) >= 5
    assert not any(json.loads(line)["error"] for line in kept)
    with simulated() as laboratory:
        session(100).run(laboratory)
    assert lines()[: len(kept)] == kept
    assert len(lines()) == 24


def test_no_kernel_works(session, simulated):
    with (
        simulated(faults=dict.fromkeys(range(99), faults.FAIL)) as laboratory,
        pytest.raises(SessionError, match=r"no kernel works on this device .*the device says no"),
    ):
        session(100).run(laboratory)


def test_a_directory_of_another_device_is_refused(session, simulated):
    with simulated() as laboratory:
        session(2).run(laboratory)
        with pytest.raises(SessionError, match=r"times do not compare .*hardware='simulated'"):
            session(2, hardware="something else").run(laboratory)


def test_two_sessions_in_one_directory_are_refused(session, simulated):
    with simulated(sleep=0.7) as laboratory, simulated() as other:
        first = threading.Thread(target=session(3).run, args=(laboratory,))
        first.start()
        time.sleep(0.5)
        with pytest.raises(SessionError, match="another session is at work"):
            session(3).run(other)
        first.join()


def test_ctrl_c_keeps_the_best(session, simulated, lines):
    def stop(run):
        if run.trials == 7 and run.stage == "search":
            raise KeyboardInterrupt

    run = session(100, on_news=stop)
    with simulated() as laboratory:
        records = run.run(laboratory)
    assert run.interrupted
    assert len(lines()) == 7
    assert len(records.by_workload) == 2
    assert Records.read(run.directory / "records") == records


def test_a_second_ctrl_c_ends_at_once_and_loses_nothing(session, simulated, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    run = session(100, on_news=stop)
    with simulated() as laboratory, pytest.raises(KeyboardInterrupt):
        run.run(laboratory)
    again = session(2)
    with simulated() as laboratory:
        records = again.run(laboratory)
    summary = summarize(again, records)
    assert summary["without_schedule"] == []
    assert summary["trials"] == 2
    assert write_summary(summary, tmp_path)[0].name == "summary.json"


def test_trials_for_what_is_not_there_are_passed_over(session, simulated, lines):
    with simulated() as laboratory:
        session(3).run(laboratory)
        path = session(3).directory / "trials.jsonl"
        entry = json.loads(lines()[-1])
        with path.open("a") as stream:
            stream.write(json.dumps({**entry, "workload": "gone"}) + "\n")
            stream.write("{}\n")
            stream.write(json.dumps({**entry, "decisions": {"hue": 1}}) + "\n")
        again = session(4)
        again.run(laboratory)
    assert again.ignored == 3
    assert again.trials == 4


def test_more_devices_measure_more(simulated, tasks):
    seconds = {}
    for count in (1, 4):
        with simulated(sleep=0.5, count=count, retries=1) as laboratory:
            batch = [Candidate(task, task.default) for task in 4 * tasks]
            # The first process waits for TVM to be imported.
            list(laboratory.measure(batch[:1]))
            start = time.monotonic()
            assert len(list(laboratory.measure(batch))) == 8
            seconds[count] = time.monotonic() - start
    assert seconds[1] / seconds[4] > 2.5


def test_records_cannot_be_read_from_a_session_that_has_none(tmp_path):
    with pytest.raises(RecordsError, match="no tuning records"):
        Records.read(tmp_path)
