"""Tuning by the command line: a session, its records, and what the compiler makes of them."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dcnv3_tvm.cli import main
from dcnv3_tvm.cli.info import tuned as tuned_text
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, TargetInfo

OPERATOR = "dcnv3-n1-h9-w9-c64-g4-k3-s1-p1-d1-f32"
MODEL = "test_internimage_pre_norm"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return the work directory of a session on a small model, what it printed, and said."""
    folder = tmp_path_factory.mktemp("tuned") / "work"
    out, err = io.StringIO(), io.StringIO()
    options = ["--trials", "40", "--work-dir", str(folder), "--threads", "1"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["tune", MODEL, *options]) == 0
    return folder, out.getvalue(), err.getvalue()


def test_a_session_says_what_it_found(tuned):
    folder, out, err = tuned
    assert "done: 40 trials" in out
    assert f"--database {folder}" in out
    assert "search, " in err
    assert "a minute" in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trials"] == 40
    assert summary["after"] <= summary["before"]
    assert sum(kernel["share_before"] for kernel in summary["kernels"]) == pytest.approx(1)
    for name in ("progress.png", "progress.svg", "shares.png", "shares.svg"):
        assert (folder / name).stat().st_size > 1000


def test_a_fresh_process_compiles_with_the_records(tuned, cli, tmp_path):
    folder = tuned[0]
    artifact = tmp_path / "artifact"
    command = [sys.executable, "-m", "dcnv3_tvm", "compile", MODEL, "--random-weights", "1"]
    done = subprocess.run(
        [*command, "--database", str(folder), "-o", str(artifact), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    outcomes = set(json.loads(done.stdout)["records"].values())
    assert "hit" in outcomes
    assert outcomes <= {"hit", "miss"}
    assert "kernels by records for cpu-" in cli("info", artifact).out
    assert cli("verify", artifact, "--random-weights", "1").code == 0


def test_what_became_of_records_is_told():
    origin = {"target": "cpu-znver4", "date": "2026-01-02T03:04:05+00:00", "hardware": "a machine"}
    metadata = ArtifactMetadata(
        name="toy",
        entries={},
        target=TargetInfo(kind="llvm", triple="", mcpu="", features=(), slug="cpu-znver4", text=""),
        records={"a": "hit", "b": "miss", "c": "hit", "d": "it is gone.", "e": "it is gone."},
        records_from=origin,
    )
    assert tuned_text(metadata) == (
        "2 of 5 kernels by records for cpu-znver4 of 2026-01-02 (a machine); 1 have none; "
        "2 refused: it is gone."
    )
    plain = dataclasses.replace(metadata, records={}, records_from={})
    assert tuned_text(plain) == "no kernel; no records were used"


def test_records_of_a_model_are_checked(tuned, cli):
    folder = tuned[0]
    outcome = cli("records", "check", folder, MODEL, "--json")
    assert outcome.code == 0
    assert all(row["record"] == "hit" for row in outcome.data)
    other = cli("records", "check", folder, MODEL, "--batch", "2", "--json")
    assert "miss" in {row["record"] for row in other.data}


def test_a_refused_record_fails_the_check(tuned, cli, tmp_path):
    folder = tuned[0]
    lines = [json.loads(line) for line in (folder / "records" / "records.jsonl").open()]
    broken = [{**line, "decisions": {"hue": 1}} for line in lines]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    (tmp_path / "about.json").write_text((folder / "records" / "about.json").read_text())
    outcome = cli("records", "check", tmp_path, MODEL)
    assert outcome.code == 1
    assert "the schedule makes no such decision; got hue" in outcome.out


def test_records_are_shown_merged_pruned_and_exported(tuned, cli, tmp_path):
    folder = tuned[0]
    shown = cli("records", "show", folder)
    assert "records for cpu-" in shown.out
    count = len(cli("records", "show", folder, "--json").data["records"])
    merged = tmp_path / "merged"
    assert cli("records", "merge", merged, folder, folder / "records").code == 0
    assert len(cli("records", "show", merged, "--json").data["records"]) == count
    assert "is not replaced" in cli("records", "merge", folder, folder, merged).err
    assert (folder / "trials.jsonl").is_file()
    table = tmp_path / "records.csv"
    assert cli("records", "export", merged, table).code == 0
    assert len(table.read_text().splitlines()) == count + 1
    kept = cli("records", "prune", merged, "--faster", "1.2", "--json").data["records"]
    assert all(record["default_seconds"] >= 1.2 * record["seconds"] for record in kept)
    assert len(kept) < count
    missing = cli("records", "show", tmp_path / "nothing")
    assert missing.code == 2
    assert "there are no tuning records" in missing.err


def test_a_dry_run_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("tune", OPERATOR, "--dry-run", "--threads", "1")
    assert outcome.code == 0
    assert "would take about" in outcome.out
    assert "dcnv3(1x9x9x64" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([OPERATOR], "a session needs a folder"),
        (["internimage_x", "--work-dir", "w"], "internimage_t"),
        (["dcnv3-n1", "--work-dir", "w"], "is not a slug"),
        (["dcnv3-nany-h9-w9-c32-g2-k3-s1-p1-d1-f32", "--work-dir", "w"], "for fixed sizes"),
        ([OPERATOR, "--work-dir", "w", "--trials", "0"], "trials is out of range"),
        ([OPERATOR, "--work-dir", "w", "--batch", "0"], "--batch is out of range"),
        ([OPERATOR, "--work-dir", "w", "--dtype", "float16"], "float16 is not supported on CPUs"),
        ([OPERATOR, "--work-dir", "w", "--target", "cuda-sm90"], "cannot be measured on this"),
        ([OPERATOR, "--work-dir", "w", "--rpc", "here"], "servers are not named"),
        ([OPERATOR, "--work-dir", "w", "--rpc", "here", "--rpc-key", "k"], "--rpc is no address"),
    ],
)
def test_bad_usage(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = cli("tune", *arguments)
    assert outcome.code in (1, 2)
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def tune_operator(folder):
    options = ["--threads", "1", "--trials", "12", "--json"]
    return ["tune", OPERATOR, "--work-dir", str(folder), *options]


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "dcnv3_tvm", *tune_operator(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_trials(path, count):
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_session_is_taken_up_again(cli, tmp_path):
    folder = tmp_path / "work"
    process = start(folder)
    wait_for_trials(folder / "trials.jsonl", 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with (folder / "trials.jsonl").open("a") as stream:
        stream.write('{"workload": "torn')
    before = (folder / "trials.jsonl").read_text().splitlines()[:-1]
    assert 2 <= len(before) <= 12
    assert cli(*tune_operator(folder)).data["trials"] == 12
    after = (folder / "trials.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 12


def test_ctrl_c_ends_a_session_tidily(tmp_path):
    folder = tmp_path / "work"
    process = start(folder)
    wait_for_trials(folder / "trials.jsonl", 1)
    # As a terminal does: to the session and all that it has started.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert json.loads(out)["interrupted"] in (True, False)
    assert (folder / "records" / "records.jsonl").read_text()


@pytest.mark.parametrize(
    ("tracker", "message"),
    [("here", "--tracker is no address"), ("127.0.0.1:1", "the RPC tracker cannot be reached")],
)
def test_a_worker_without_a_tracker(cli, tracker, message):
    outcome = cli("worker", "--tracker", tracker, "--key", "k")
    assert outcome.code in (1, 2)
    assert message in outcome.err
