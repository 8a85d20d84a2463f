"""Results as data, and the refusal of wrong outputs."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from dcnv3_tvm.bench.contestants import OURS, PEERS, Contestant, error_of, select_peers
from dcnv3_tvm.bench.floors import Floors, Peaks
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import CSV_FIELDS, Report, Row, table_rows
from dcnv3_tvm.bench.runner import compete
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import Provenance

TRUTH = [np.linspace(-2.0, 2.0, 12).reshape(3, 4)]
PEAKS = Peaks(flops=1e11, bytes=1e10, how="made up")
PLAN = Plan(rounds=3, calls=4, dropped=1, pause=0.0)


class Ticks:
    """Contestants whose calls take as long as they say."""

    def __init__(self):
        self.now = 0.0
        self.calls = 0

    def contestant(self, name, seconds, outputs=TRUTH, tolerance=1e-3):
        def call():
            self.now += seconds
            self.calls += 1
            return outputs

        return Contestant(name, call, list, tolerance)

    def compete(self, *contestants, failures=(), **options):
        return compete(
            "case",
            TRUTH,
            contestants,
            failures,
            Floors.of(1e8, 2e7, PEAKS),
            PLAN,
            clock=lambda: self.now,
            sleep=lambda _: None,
            **options,
        )


def report(*cases, skipped=None):
    provenance = Provenance("CPU", 2, 2, 0.5, "2026-01-02T03:04:05+00:00", None, {"tvm": "0.27"})
    return Report("op", provenance, PLAN, PEAKS, cases, skipped or {})


@pytest.fixture
def fair():
    ticks = Ticks()
    failure = Row("compile", failure="RuntimeError: no compiler")
    contestants = [ticks.contestant(OURS, 0.5), ticks.contestant("torch", 2.0)]
    return ticks.compete(*contestants, failures=[failure])


@pytest.fixture
def unfair():
    ticks = Ticks()
    wrong = [TRUTH[0] + 0.1]
    contestants = [ticks.contestant(OURS, 0.5), ticks.contestant("torch", 2.0, wrong)]
    return ticks.compete(*contestants), ticks


def test_right_outputs_are_timed(fair):
    ours, torch, failed = fair.rows
    assert ours.ratio.median == 1.0
    assert torch.seconds.median == pytest.approx(2.0)
    assert torch.ratio.median == pytest.approx(4.0)
    assert failed.seconds is None
    assert report(fair).ok
    assert fair.floors == Floors(copy=2e-3, arithmetic=1e-3)
    text = report_text(report(fair, skipped={"openvino": "not installed"}))
    for words in ("4.00x", "2000.0", "no compiler", "floor: copy", "not installed", "made up"):
        assert words in text


def test_wrong_outputs_are_refused(unfair):
    case, ticks = unfair
    assert case.wrong == ["torch"]
    assert ticks.calls == 2  # once each, for the comparison
    assert all(row.seconds is None and row.ratio is None for row in case.rows)
    assert not report(case).ok
    text = report_text(report(case))
    assert "WRONG" in text
    assert "the outputs of torch are not" in text
    assert "x  " not in "\n".join(cell for row in table_rows(case) for cell in row)


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [TRUTH[0], TRUTH[0]],
        [TRUTH[0].T],
        [np.full((3, 4), np.nan)],
        [np.where(TRUTH[0] > 1.9, np.inf, TRUTH[0])],
        [np.zeros((3, 4))],
    ],
)
def test_kinds_of_wrong(outputs):
    ticks = Ticks()
    case = ticks.compete(ticks.contestant(OURS, 1.0, outputs))
    assert case.wrong == [OURS]
    copied = Report.from_json(json.loads(json.dumps(report(case).to_json())))
    assert copied.cases[0].wrong == [OURS]


def test_error_is_relative_to_each_output():
    truth = [np.array([100.0, -100.0]), np.array([1.0, 0.5])]
    outputs = [truth[0] + 0.1, truth[1] + 0.002]
    assert error_of(outputs, truth) == pytest.approx(0.002)


def test_error_of_norms():
    truth = [np.array([3.0, -4.0]), np.array([100.0, 0.0])]
    outputs = [truth[0] + [0.3, 0.4], truth[1] + 2.0]
    assert error_of(outputs, truth, "norm") == pytest.approx(0.1)
    assert np.isnan(error_of(outputs[:1], truth, "norm"))
    assert np.isnan(error_of([outputs[0], outputs[1] * np.nan], truth, "norm"))


def test_bfloat16_has_a_measure_and_a_floor_of_its_own():
    ticks = Ticks()
    # One element far off: too far for the maximum, not for the norm.
    outputs = [TRUTH[0].copy()]
    outputs[0][1, 1] += 0.04
    contestant = ticks.contestant(OURS, 1.0, outputs, tolerance=1e-2)
    assert ticks.compete(contestant).wrong == [OURS]
    case = ticks.compete(contestant, measure_error="norm")
    assert case.wrong == []
    written = report(case)
    assert Report.from_json(json.loads(json.dumps(written.to_json()))) == written
    assert "‖error‖ / ‖reference‖" in report_text(written)
    assert Floors.of(1e8, 2e7, PEAKS, "bfloat16") == Floors(copy=2e-3, arithmetic=5e-4)
    # Files from before there was more than one measure.
    data = written.to_json()
    del data["cases"][0]["measure"]
    assert Report.from_json(data).cases[0].measure == "max"


def test_a_peer_that_fails_is_told_and_an_own_failure_is_raised():
    ticks = Ticks()

    def fail():
        raise RuntimeError("lost\nmore")

    case = ticks.compete(ticks.contestant(OURS, 1.0), Contestant("openvino", fail, list, 1.0))
    assert case.rows[1].failure == "RuntimeError: lost"
    assert case.rows[0].seconds is not None
    with pytest.raises(RuntimeError, match="lost"):
        ticks.compete(Contestant(OURS, fail, list, 1.0))


def test_json_round_trip(fair):
    written = report(fair, skipped={"openvino": "not installed"})
    data = json.loads(json.dumps(written.to_json(), allow_nan=False))
    assert data["schema"] == 1
    assert Report.from_json(data) == written


def test_csv_round_trip(fair, unfair):
    found = report(fair, dataclasses.replace(unfair[0], slug="other"))
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert tuple(rows[0]) == CSV_FIELDS
    assert [(row["case"], row["contestant"]) for row in rows] == [
        ("case", OURS),
        ("case", "torch"),
        ("case", "compile"),
        ("other", OURS),
        ("other", "torch"),
    ]
    assert float(rows[1]["median_ms"]) == pytest.approx(2000.0)
    assert float(rows[1]["ratio"]) == pytest.approx(4.0)
    assert float(rows[1]["copy_floor_ms"]) == pytest.approx(2.0)
    assert rows[2]["failure"] == "RuntimeError: no compiler"
    assert (rows[4]["wrong"], rows[4]["median_ms"], rows[4]["ratio"]) == ("True", "", "")
    assert rows[0]["versions"] == "tvm=0.27"


def test_picture(fair, unfair, tmp_path):
    from dcnv3_tvm.bench.plot import save_plot

    save_plot(report(fair, unfair[0]), tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    assert "<svg" in text
    with pytest.raises(InvalidArgumentError, match="nothing to draw"):
        save_plot(report(unfair[0]), tmp_path / "none.svg")
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        save_plot(report(fair), tmp_path / "nowhere" / "bars.svg")


def test_peers_by_name():
    assert [peer.name for peer in select_peers(["openvino", "torch"])] == ["torch", "openvino"]
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    with pytest.raises(InvalidArgumentError, match="no such peer"):
        select_peers(["tensorrt"])


def test_peers_by_dtype():
    exact, short = select_peers(), select_peers(dtype="bfloat16")
    named = [peer.name for peer in PEERS if peer.by_default]
    assert [peer.name for peer in exact] == named[:-1]
    assert [peer.name for peer in short] == named
    with pytest.raises(InvalidArgumentError, match="in float32"):
        select_peers(["openvino-bf16"])


def test_a_missing_package_is_named():
    peer = dataclasses.replace(PEERS[0], packages=("torch", "no-such-package"))
    assert peer.missing == ["no-such-package"]


def test_machine_line():
    here = Provenance.here(threads=3)
    assert "3 threads" in here.line
    assert "tvm 0.27" in here.line
    assert here.date.endswith("+00:00")
