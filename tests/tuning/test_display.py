"""Display of a running session."""

import errno
import io

import pytest

from dcnv3_tvm.tuning.display import Display, headline, screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run_displayed(session, simulated, monkeypatch):
    """Run a session with a display of which every update is due; return what it shows."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")

    def run(stream):
        times = iter(range(0, 10**6, 60))
        display = Display(stream, clock=lambda: next(times))
        with simulated() as measurer:
            session(24, on_update=display.show).run(measurer)
        return stream.getvalue()

    return run


def test_lines_without_terminal(run_displayed):
    shown = run_displayed(io.StringIO())
    lines = shown.splitlines()
    assert "\x1b" not in shown
    assert "search: 1 of 24 trials, " in lines[0]
    assert "min left" in lines[0]
    assert "done: 24 of 24 trials, " in lines[-1]


def test_screen_is_refreshed_in_place_on_terminal(run_displayed):
    shown = run_displayed(Terminal())
    assert shown.startswith("\x1b[2J\x1b[H")
    assert shown.count("\x1b[2J") == 1
    last = shown.rpartition("\x1b[H")[2]
    assert "tune for cpu-" in last
    assert last.count("matmul(") == 2
    assert "12/12" in last


class Closed(Terminal):
    def write(self, text):  # noqa: ARG002
        raise OSError(errno.EIO, "Input/output error")


def test_the_search_goes_on_without_its_terminal(session):
    Display(Closed(), clock=lambda: 60.0).show(session(24))


def test_lines_on_a_dumb_terminal(session, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Display(stream, clock=lambda: 60.0).show(session(24))
    assert "\x1b" not in stream.getvalue()
    assert "0 of 24 trials" in stream.getvalue()


def test_updates_are_throttled_except_for_new_stages(session):
    stream = io.StringIO()
    now = [0.0]
    display = Display(stream, clock=lambda: now[0])
    run = session(24)
    for now[0], run.stage in ((1.0, "search"), (2.0, "search"), (7.0, "search"), (7.1, "done")):
        display.show(run)
    stages = [line.partition("] ")[2].partition(":")[0] for line in stream.getvalue().splitlines()]
    assert stages == ["search", "search", "done"]


def test_screen_fits_terminal(session):
    run = session(24)
    for columns, rows in ((40, 6), (100, 24), (20, 2)):
        lines = screen(run, columns, rows)
        assert all(len(line) <= columns for line in lines)
        assert len(lines) <= max(rows, 6)
    assert "0 of 24 trials" in headline(run)
