"""The list of trials: nothing lost, nothing torn."""

import errno
import os

import pytest

from dcnv3_tvm.tuning.journal import Journal, SessionError


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "trials.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        journal.append({"a": 2})
    with Journal(path) as journal:
        assert journal.entries == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n'[:-cut])
    with Journal(path) as journal:
        assert journal.entries == [{"a": 1}]
        journal.append({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_damaged_line_is_not_guessed_at(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(SessionError, match="list of trials is damaged"):
        Journal(path)
    assert path.read_text() == '{"a": 1}\n{"a"\n{"a": 2}\n'


def test_two_sessions_are_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    with Journal(path), pytest.raises(SessionError, match="another session is at work"):
        Journal(path)
    with Journal(path) as journal:
        assert journal.entries == []


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_is_reported_and_leaves_whole_lines(tmp_path, monkeypatch, written):
    path = tmp_path / "trials.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        real = os.write

        def full(file, data):
            if written:
                return real(file, data[:written])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(SessionError, match=r"cannot be kept; got .*(full|No space left)"):
            journal.append({"a": 2})
        monkeypatch.undo()
        assert path.read_text() == '{"a": 1}\n'
        journal.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_directory_that_cannot_be_written(tmp_path):
    with pytest.raises(SessionError, match="cannot be written; got No such file"):
        Journal(tmp_path / "missing" / "trials.jsonl")
