"""What a session shows while it runs."""

import io

from dcnv3_tvm.tuning.display import Display, headline, screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal(session, simulated):
    stream = io.StringIO()
    run = session(24, on_news=Display(stream).show)
    with simulated() as laboratory:
        run.run(laboratory)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert "search, " in lines[0]
    assert "min left" in lines[0]
    assert "done, 24 of 24 trials" in lines[-1]


def test_one_screen_on_a_terminal(session, simulated, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    stream = Terminal()
    run = session(24, on_news=Display(stream).show)
    with simulated() as laboratory:
        run.run(laboratory)
    shown = stream.getvalue()
    assert shown.startswith("\x1b[2J\x1b[H")
    assert shown.count("\x1b[2J") == 1
    last = shown.rpartition("\x1b[H")[2]
    assert "tune for cpu-" in last
    assert last.count("matmul(") == 2
    assert "12/12" in last


def test_a_screen_is_no_larger_than_the_terminal(session):
    run = session(24)
    for columns, rows in ((40, 6), (100, 24), (20, 2)):
        lines = screen(run, columns, rows)
        assert all(len(line) <= columns for line in lines)
        assert len(lines) <= max(rows, 6)
    assert "0 of 24 trials" in headline(run)
