"""Tuning sessions on simulated devices: search, selection, resumption and failures."""

import dataclasses
import json

import pytest

from dcnv3_tvm.errors import InvalidArgumentError, TuningError
from dcnv3_tvm.schedules.records import Records, RecordsError
from dcnv3_tvm.tuning.display import headline
from dcnv3_tvm.tuning.summary import summarize, totals_text, write_summary
from dcnv3_tvm.tuning.trial_log import TrialLog
from helpers import simulated_runner


def test_all_schedules_are_tried_and_best_recorded(session, simulated, tasks, logged_trials):
    run = session(100)
    with simulated() as measurer:
        records = run.run(measurer)
    trials = logged_trials()
    assert run.trials == 24 == len(trials)
    assert Records.read(run.directory / "records") == records
    assert set(records.by_workload) == {task.workload for task in tasks}
    assert {trial["workload"]: trial["decisions"] for trial in trials[:2]} == {
        task.workload: task.default for task in tasks
    }
    # Simulated measurements get faster one by one, so the default is the slowest.
    for record in records.by_workload.values():
        assert record.seconds < record.default_seconds
    assert records.about.trials == 24


def test_trials_go_to_kernel_with_most_time(session, simulated, tasks):
    run = session(16)
    run.states[1].task = dataclasses.replace(tasks[1], calls=50)
    with simulated() as measurer:
        run.run(measurer)
    assert run.trials == 16
    assert run.states[1].trials > run.states[0].trials


def test_time_limit_leaves_time_for_final_measurement(session, simulated):
    now = [0.0]

    def advance(_):
        now[0] += 1

    # After the first batch 18 s have passed, and 24 more measurements would exceed the limit.
    run = session(24, minutes=0.5, clock=lambda: now[0], on_update=advance)
    with simulated() as measurer:
        records = run.run(measurer)
    assert run.trials == 18
    assert len(records.by_workload) == 2


def test_session_is_continued(session, simulated, logged_trials):
    with simulated() as measurer:
        session(10).run(measurer)
        before = logged_trials()
        continued = session(14)
        continued.run(measurer)
    trials = logged_trials()
    assert continued.trials == 14
    assert trials[:10] == before
    schedules = {json.dumps([trial["workload"], trial["decisions"]]) for trial in trials}
    assert len(schedules) == 14


def test_exhausted_search_space_ends_session(session, simulated, logged_trials):
    with simulated() as measurer:
        session(100).run(measurer)
        session(100).run(measurer)
    assert len(logged_trials()) == 24


def test_failed_trials_affect_no_other(session, simulated, logged_trials):
    faults = {3: simulated_runner.CRASH, 8: simulated_runner.FAIL}
    run = session(100)
    with simulated(faults=faults) as measurer:
        records = run.run(measurer)
    errors = sorted(trial["error"] for trial in logged_trials() if trial["error"])
    assert errors == ["RuntimeError: the device failed", "crashed (SIGSEGV)"]
    assert sum(state.failed for state in run.states) == 2
    assert len(records.by_workload) == 2


def test_lost_devices_lose_no_trial(session, simulated, logged_trials):
    faults = dict.fromkeys((2, 3, 7, 11), simulated_runner.CRASH)
    with simulated(faults=faults, size=2, retries=2) as measurer:
        session(100).run(measurer)
    trials = logged_trials()
    assert len(trials) == 24
    assert not any(trial["error"] for trial in trials)


def test_schedule_with_wrong_result_is_not_recorded(session, simulated, tasks, logged_trials):
    with simulated(error="wrong result: error 1e-1") as measurer:
        records = session(100).run(measurer)
    assert [record.decisions for record in records.by_workload.values()] == [
        task.default for task in tasks
    ]
    assert any("wrong result" in trial["error"] for trial in logged_trials())


def test_full_disk_ends_session_without_failed_trials(session, simulated, logged_trials):
    with (
        simulated(faults={5: simulated_runner.DISK_FULL}) as measurer,
        pytest.raises(TuningError, match=r"no disk space for compiled candidates; .*No space left"),
    ):
        session(100).run(measurer)
    before = logged_trials()
    assert len(before) >= 5
    assert not any(trial["error"] for trial in before)
    with simulated() as measurer:
        session(100).run(measurer)
    assert logged_trials()[: len(before)] == before
    assert len(logged_trials()) == 24


def test_session_fails_if_all_defaults_fail(session, simulated):
    always = dict.fromkeys(range(99), simulated_runner.FAIL)
    with (
        simulated(faults=always) as measurer,
        pytest.raises(TuningError, match=r"default schedules of all kernels .*the device failed"),
    ):
        session(100).run(measurer)


def test_work_directory_of_other_hardware_is_rejected(session, simulated):
    with simulated() as measurer:
        session(2).run(measurer)
        with pytest.raises(InvalidArgumentError, match=r"not comparable .*hardware='simulated'"):
            session(2, hardware="something else").run(measurer)


def test_work_directory_with_something_else_is_rejected(session, simulated):
    run = session(2)
    run.directory.mkdir()
    for content in ("[]", '{"target": 3}', "[" * 200_000):
        (run.directory / "session.json").write_text(content)
        with simulated() as measurer, pytest.raises(InvalidArgumentError, match="cannot be used"):
            run.run(measurer)
    thesis = run.directory / "thesis.tex"
    (run.directory / "session.json").rename(thesis)
    with simulated() as measurer, pytest.raises(InvalidArgumentError, match="something other"):
        run.run(measurer)
    assert list(run.directory.iterdir()) == [thesis]


def test_concurrent_session_in_work_directory_is_rejected(session, simulated):
    run = session(3)
    run.context.bind(run.directory)
    with (
        TrialLog(run.directory / "trials.jsonl"),
        simulated() as measurer,
        pytest.raises(TuningError, match="another tuning session"),
    ):
        run.run(measurer)


def test_ctrl_c_records_best_so_far(session, simulated, logged_trials):
    def interrupt(run):
        if run.trials == 7 and run.stage == "search":
            raise KeyboardInterrupt

    run = session(100, on_update=interrupt)
    with simulated() as measurer:
        records = run.run(measurer)
    assert run.interrupted
    assert run.stage == "interrupted"
    assert len(logged_trials()) == 7
    assert len(records.by_workload) == 2
    assert Records.read(run.directory / "records") == records


def test_second_ctrl_c_ends_session_and_loses_no_trial(session, simulated, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    run = session(100, on_update=interrupt)
    with simulated() as measurer, pytest.raises(KeyboardInterrupt):
        run.run(measurer)
    continued = session(2)
    with simulated() as measurer:
        records = continued.run(measurer)
    summary = summarize(continued, records)
    assert summary["without_schedule"] == []
    assert summary["trials"] == 2
    assert write_summary(summary, tmp_path)[0].name == "summary.json"


def test_summary_and_last_headline_agree(session, simulated):
    run = session(24)
    with simulated() as measurer:
        summary = summarize(run, run.run(measurer))
    totals = ("trials", "max_trials", "trials_per_minute", "before", "after")
    text = totals_text(**{name: summary[name] for name in totals})
    assert headline(run).endswith(f"done: {text}")
    assert summary["after"] < summary["before"]


def test_unknown_trials_are_ignored(session, simulated, logged_trials):
    with simulated() as measurer:
        session(3).run(measurer)
        last = logged_trials()[-1]
        with (session(3).directory / "trials.jsonl").open("a") as stream:
            for entry in ({**last, "workload": "gone"}, {**last, "decisions": {"hue": 1}}):
                stream.write(json.dumps(entry) + "\n")
        continued = session(4)
        continued.run(measurer)
    assert continued.ignored == 2
    assert continued.trials == 4


def test_directory_without_records_raises(tmp_path):
    with pytest.raises(RecordsError, match="no tuning records"):
        Records.read(tmp_path)
