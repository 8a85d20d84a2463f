"""Trial log: durable, single writer, never torn."""

import errno
import json
import os

import pytest

from dcnv3_tvm.errors import InvalidArgumentError, TuningError
from dcnv3_tvm.tuning.trial_log import TrialLog


def trial(rows, **changes):
    return {"workload": "w", "decisions": {"rows": rows}, "seconds": 1e-3, "error": ""} | changes


def line(rows, **changes):
    return json.dumps(trial(rows, **changes)) + "\n"


def test_entries_are_read_back(tmp_path):
    path = tmp_path / "trials.jsonl"
    with TrialLog(path) as log:
        log.append(trial(1))
        log.append(trial(2))
    with TrialLog(path) as log:
        assert log.entries == [trial(1), trial(2)]


@pytest.mark.parametrize("cut", range(1, 9))
def test_incomplete_last_line_is_truncated(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    path.write_text((line(1) + line(2))[:-cut])
    with TrialLog(path) as log:
        assert log.entries == [trial(1)]
        log.append(trial(3))
    assert path.read_text() == line(1) + line(3)


@pytest.mark.parametrize(
    "invalid",
    [
        '{"a"\n',
        "[]\n",
        "3\n",
        "[" * 200_000 + "\n",
        line(2, workload=["w"]),
        line(2, decisions=[]),
        line(2, decisions={"rows": [2]}),
        line(2, seconds="1"),
        line(2, seconds=-1.0),
        line(2, seconds=float("nan")),
    ],
    ids=range(10),
)
def test_invalid_line_raises_and_is_kept(tmp_path, invalid):
    path = tmp_path / "trials.jsonl"
    path.write_text(line(1) + invalid + line(2))
    with pytest.raises(InvalidArgumentError, match="the trial log has an invalid line"):
        TrialLog(path)
    assert path.read_text() == line(1) + invalid + line(2)


def test_second_writer_is_rejected(tmp_path):
    path = tmp_path / "trials.jsonl"
    with TrialLog(path), pytest.raises(TuningError, match="another tuning session"):
        TrialLog(path)
    with TrialLog(path) as log:
        assert log.entries == []


@pytest.mark.parametrize("written", [0, 5])
def test_full_disk_raises_and_leaves_complete_lines(tmp_path, monkeypatch, written):
    path = tmp_path / "trials.jsonl"
    with TrialLog(path) as log:
        log.append(trial(1))
        write = os.write

        def write_to_full_disk(file, data):
            if written:
                return write(file, data[:written])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write_to_full_disk)
        with pytest.raises(TuningError, match=r"cannot be written; got .*(full|No space left)"):
            log.append(trial(2))
        monkeypatch.undo()
        assert path.read_text() == line(1)
        log.append(trial(2))
    assert path.read_text() == line(1) + line(2)


def test_missing_directory_raises(tmp_path):
    with pytest.raises(InvalidArgumentError, match="not writable; got No such file"):
        TrialLog(tmp_path / "missing" / "trials.jsonl")
