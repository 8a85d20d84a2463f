"""How many schedules a minute are tried."""

import json

from dcnv3_tvm.cli import main
from dcnv3_tvm.tuning import rate


def test_rates_stand_beside_each_other(monkeypatch, capsys, tmp_path):
    # TVM's own builder takes a minute.
    monkeypatch.setattr(rate, "_stock", lambda batch, *_: 2.0 * len(batch))
    files = [str(tmp_path / name) for name in ("rates.json", "rates.csv")]
    arguments = ["--trials", "14", "--json", files[0], "--csv", files[1]]
    assert main(["bench", "trials", *arguments]) == 0
    ours, stock = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert (ours["trials"], stock["trials"]) == (14, 14)
    assert ours["trials_per_minute"] == 60 * 14 / ours["seconds"]
    assert stock["trials_per_minute"] == 30
    assert (tmp_path / "rates.csv").read_text().count("\n") == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[-3:] == ["14", "28.0", "30"]
