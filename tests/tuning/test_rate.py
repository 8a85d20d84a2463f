"""How many schedules a minute are tried."""

from dcnv3_tvm.tuning import rate


def test_rates_stand_beside_each_other(monkeypatch):
    # TVM's own builder takes half a minute to start.
    monkeypatch.setattr(rate, "_stock", lambda batch, *_: 2.0 * len(batch))
    found = rate.list_rates(14, threads=1)
    ours, stock = found.rows
    assert (ours.trials, stock.trials) == (14, 14)
    assert ours.trials_per_minute == 60 * 14 / ours.seconds
    assert stock.trials_per_minute == 30
    assert found.cells()[1][1:] == ("    14", "   28.0", "             30")
    assert found.to_csv().count("\n") == 3
