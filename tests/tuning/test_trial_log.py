"""Trial log: durable, single writer, never torn."""

import errno
import os

import pytest

from dcnv3_tvm.errors import TuningError
from dcnv3_tvm.tuning.trial_log import TrialLog


def test_entries_are_read_back(tmp_path):
    path = tmp_path / "trials.jsonl"
    with TrialLog(path) as log:
        log.append({"a": 1})
        log.append({"a": 2})
    with TrialLog(path) as log:
        assert log.entries == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_incomplete_last_line_is_truncated(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n'[:-cut])
    with TrialLog(path) as log:
        assert log.entries == [{"a": 1}]
        log.append({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_invalid_line_raises_and_is_kept(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(TuningError, match="the trial log has an invalid line"):
        TrialLog(path)
    assert path.read_text() == '{"a": 1}\n{"a"\n{"a": 2}\n'


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
        log.append({"a": 1})
        write = os.write

        def write_to_full_disk(file, data):
            if written:
                return write(file, data[:written])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write_to_full_disk)
        with pytest.raises(TuningError, match=r"cannot be written; got .*(full|No space left)"):
            log.append({"a": 2})
        monkeypatch.undo()
        assert path.read_text() == '{"a": 1}\n'
        log.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_missing_directory_raises(tmp_path):
    with pytest.raises(TuningError, match="not writable; got No such file"):
        TrialLog(tmp_path / "missing" / "trials.jsonl")
