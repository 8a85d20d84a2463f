"""Comparison of backends, and its reports."""

import dataclasses
import json

import numpy as np
import pytest

from dcnv3_tvm.bench.backends import OURS, PEERS, Backend, select_peers
from dcnv3_tvm.bench.comparison import compare_backends
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import Report
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.bench.runners import BackendRunner
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import Provenance

REFERENCES = [np.linspace(-2.0, 2.0, 12).reshape(3, 4)]
PEAKS = Peaks(flops=1e11, bytes=1e10, how="made up")
PLAN = Plan(rounds=3, calls=4, dropped=1, pause=0.0)


class Simulation:
    """Backends whose calls take the given time on a simulated clock."""

    def __init__(self):
        self.now = 0.0
        self.calls = 0

    def backend(self, seconds, outputs=REFERENCES, tolerance=1e-3):
        def call():
            self.now += seconds
            self.calls += 1
            return outputs

        return Backend(BackendRunner(call, list), tolerance)

    def compare(self, backends, builders=None, **options):
        return compare_backends(
            "case",
            {name: lambda backend=backend: backend for name, backend in backends.items()}
            | (builders or {}),
            REFERENCES,
            Roofline.of(1e8, 2e7, PEAKS),
            PLAN,
            clock=lambda: self.now,
            sleep=lambda _: None,
            **options,
        )


def report(*cases, skipped=None):
    provenance = Provenance("CPU", 2, 2, 0.5, "2026-01-02T03:04:05+00:00", None, {"tvm": "0.27"})
    return Report("op", provenance, PLAN, PEAKS, cases, skipped or {})


def fail():
    raise RuntimeError("lost\nmore")


@pytest.fixture
def correct():
    simulation = Simulation()
    backends = {OURS: simulation.backend(0.5), "torch": simulation.backend(2.0)}
    return simulation.compare(backends, builders={"compile": fail})


@pytest.fixture
def wrong():
    simulation = Simulation()
    outputs = [REFERENCES[0] + 0.1]
    backends = {OURS: simulation.backend(0.5), "torch": simulation.backend(2.0, outputs)}
    return simulation.compare(backends), simulation


def test_correct_backends_are_timed(correct):
    ours, torch, failed = correct.rows
    assert ours.ratio.median == 1.0
    assert torch.seconds.median == pytest.approx(2.0)
    assert torch.ratio.median == pytest.approx(4.0)
    assert failed.seconds is None
    assert failed.failure == "RuntimeError: lost"
    assert report(correct).ok
    assert correct.roofline == Roofline(memory=2e-3, arithmetic=1e-3)
    text = report_text(report(correct, skipped={"openvino": "not installed"}))
    for part in ("4.00x", "2000.0", "lost", "roofline: memory", "not installed", "made up"):
        assert part in text


def test_wrong_outputs_prevent_timing(wrong):
    case, simulation = wrong
    assert case.wrong == ["torch"]
    assert simulation.calls == 2  # one comparison each
    assert all(row.seconds is None and row.ratio is None for row in case.rows)
    assert not report(case).ok
    assert "wrong outputs of torch" in report_text(report(case))


def test_keep_going_times_the_correct_backends():
    simulation = Simulation()
    backends = {
        OURS: simulation.backend(0.5, [REFERENCES[0] + 0.1]),
        "torch": simulation.backend(2.0),
    }
    ours, torch = simulation.compare(backends, keep_going=True).rows
    assert (ours.wrong, ours.seconds) == (True, None)
    assert torch.seconds.median == pytest.approx(2.0)
    assert torch.ratio is None


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [REFERENCES[0], REFERENCES[0]],
        [REFERENCES[0].T],
        [np.full((3, 4), np.nan)],
        [np.where(REFERENCES[0] > 1.9, np.inf, REFERENCES[0])],
        [np.zeros((3, 4))],
    ],
)
def test_kinds_of_wrong_outputs(outputs):
    simulation = Simulation()
    case = simulation.compare({OURS: simulation.backend(1.0, outputs)})
    assert case.wrong == [OURS]
    data = json.loads(json.dumps(report(case).to_json(), allow_nan=False))
    assert data["cases"][0]["rows"][0]["wrong"]


def test_norm_error_allows_a_large_error_of_one_element():
    simulation = Simulation()
    outputs = [REFERENCES[0].copy()]
    outputs[0][1, 1] += 0.04
    backends = {OURS: simulation.backend(1.0, outputs, tolerance=1e-2)}
    assert simulation.compare(backends).wrong == [OURS]
    case = simulation.compare(backends, error_measure="norm")
    assert case.wrong == []
    assert "relative L2 errors" in report_text(report(case))


def test_failure_of_a_peer_is_reported_and_our_own_is_raised():
    simulation = Simulation()
    failing = Backend(BackendRunner(fail, list), tolerance=1.0)
    case = simulation.compare({OURS: simulation.backend(1.0), "openvino": failing})
    assert case.rows[1].failure == "RuntimeError: lost"
    assert case.rows[0].seconds is not None
    with pytest.raises(RuntimeError, match="lost"):
        simulation.compare({OURS: failing})
    with pytest.raises(RuntimeError, match="lost"):
        simulation.compare({}, builders={OURS: fail})


def test_json(correct):
    data = json.loads(json.dumps(report(correct, skipped={"x": "y"}).to_json(), allow_nan=False))
    assert (data["schema"], data["kind"], data["skipped"]) == (2, "op", {"x": "y"})
    (case,) = data["cases"]
    assert case["roofline"] == {"memory": 2e-3, "arithmetic": 1e-3}
    assert [row["name"] for row in case["rows"]] == [OURS, "torch", "compile"]
    assert case["rows"][1]["seconds"]["median"] == pytest.approx(2.0)


def test_plot(correct, wrong, tmp_path):
    from dcnv3_tvm.bench.plot import save_plot

    save_plot(report(correct, wrong[0]), tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    assert "<svg" in text
    with pytest.raises(InvalidArgumentError, match="nothing to plot"):
        save_plot(report(wrong[0]), tmp_path / "none.svg")
    with pytest.raises(InvalidArgumentError, match="the picture cannot be written"):
        save_plot(report(correct), tmp_path / "nowhere" / "bars.svg")


def test_peers_by_name():
    assert [peer.name for peer in select_peers(["openvino", "torch"])] == ["torch", "openvino"]
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    with pytest.raises(InvalidArgumentError, match="unknown backend"):
        select_peers(["tensorrt"])


def test_peers_by_dtype():
    named = [peer.name for peer in PEERS if peer.by_default]
    assert [peer.name for peer in select_peers()] == named[:-1]
    assert [peer.name for peer in select_peers(dtype="bfloat16")] == named
    with pytest.raises(InvalidArgumentError, match="for float32"):
        select_peers(["openvino-bf16"])
    with pytest.raises(InvalidArgumentError, match="for gradients"):
        select_peers(["openvino"], gradients=True)


def test_missing_packages():
    peer = dataclasses.replace(PEERS[0], packages=("torch", "no-such-package"))
    assert peer.missing == ["no-such-package"]


def test_provenance_line():
    here = Provenance.here(threads=3)
    assert "3 threads" in here.line
    assert "tvm 0.27" in here.line
    assert here.date.endswith("+00:00")
