"""Progress on a terminal, elsewhere, and not at all."""

import io
import sys

import pytest

from dcnv3_tvm import progress
from dcnv3_tvm.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_steps(kind):
    stream = kind()
    with Progress("job", stream=stream) as shown:
        shown.step("first [1]")
        shown.note("a note")
        shown.step("second")
    text = stream.getvalue()
    assert "job: done" in text
    assert "a note\n" in text
    assert ("\x1b" in text) is (kind is Terminal)
    if kind is io.StringIO:
        assert text.count("\n") == 4
        assert "job: first [1]\n" in text
    with pytest.raises(KeyError), Progress("job", stream=stream):
        raise KeyError
    assert "job: stopped" in stream.getvalue()


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    stream = Terminal()
    with Progress("job", stream=stream) as shown:
        shown.step("first")
    assert stream.getvalue() == "[   0.0 s] job: first\n[   0.0 s] job: done\n"


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with Progress("job", stream=stream) as shown:
        shown.step("first")
    for color in ("\x1b[3", "\x1b[9", "\x1b[38;"):
        assert color not in stream.getvalue()


def test_dumb_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("job", stream=stream) as shown:
        shown.step("first")
    assert stream.getvalue() == "[   0.0 s] job: first\n[   0.0 s] job: done\n"


def test_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Progress("a long name of the job", stream=stream) as shown:
        shown.step("first")
    bar = stream.getvalue().partition("job: done")[0]
    assert "0 s" in bar
    assert "first" in bar


def test_redirected_stdout_keeps_results(capsys):
    stream = Terminal()
    with Progress("job", stream=stream):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in stream.getvalue()


def test_quiet():
    stream = io.StringIO()
    with Progress("job", stream=stream, quiet=True) as shown:
        shown.step("first")
        shown.count(1, 2)
        shown.note("a warning")
    assert stream.getvalue() == "a warning\n"


def test_time_left_of_steps(clock):
    with Progress("job", steps={"a": 1, "b": 2, "c": 1}, stream=io.StringIO()) as shown:
        shown.step("a")
        assert shown.seconds_left is None
        clock[0] += 3
        shown.step("b")
        assert shown.seconds_left == pytest.approx(9)
        clock[0] += 2
        assert shown.seconds_left == pytest.approx(7)
        clock[0] += 4
        shown.step("c")
        assert shown.seconds_left == pytest.approx(3)
        clock[0] += 10
        assert shown.seconds_left == 0


def test_time_left_of_items(clock):
    stream = io.StringIO()
    with Progress("job", stream=stream) as shown:
        clock[0] += 10
        shown.count(2, 10)
        assert "2 of 10, 0.2/s, 40 s left" in stream.getvalue()
        assert shown.seconds_left == pytest.approx(40)
        clock[0] += 1
        shown.count(3, 10)
        assert "3 of 10" not in stream.getvalue()
