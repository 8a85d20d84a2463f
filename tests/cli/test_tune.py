"""``dcnv3-tvm tune``, ``records`` and ``worker``, and compilation with the records of a session."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from dcnv3_tvm.cli import compile as compile_verb
from dcnv3_tvm.cli import main, parser, tune
from dcnv3_tvm.cli.info import tuning_summary
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, TargetInfo

OPERATOR = "dcnv3-n1-h9-w9-c64-g4-k3-s1-p1-d1-f32"
MODEL = "test_internimage_pre_norm"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tune a small model; return the work directory and the text on stdout and stderr."""
    folder = tmp_path_factory.mktemp("tuned") / "work"
    out, err = io.StringIO(), io.StringIO()
    options = ["--trials", "40", "--timeout", "600", "--threads", "1", "--work-dir", str(folder)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["tune", MODEL, *options]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_summary_agrees_with_last_headline(tuned):
    folder, out, err = tuned
    (summary_line,) = (line for line in out.splitlines() if line.startswith("done: "))
    assert summary_line.startswith("done: 40 of 40 trials, ")
    assert err.splitlines()[-1].endswith(f"] {summary_line}")
    assert f"next: dcnv3-tvm compile {MODEL} --checkpoint FILE --target cpu-" in out
    assert f" --dtype float32 --batch 1 --database {folder} -o {MODEL}" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trials"] == 40
    assert summary["after"] <= summary["before"]
    assert sum(kernel["share_before"] for kernel in summary["kernels"]) == pytest.approx(1)
    for name in ("progress.png", "progress.svg", "shares.png", "shares.svg"):
        assert (folder / name).stat().st_size > 1000


def test_next_command_repeats_the_options():
    options = ["--batch", "2", "--size", "32x48", "--dtype", "bfloat16"]
    whole = parser({"tune": tune, "compile": compile_verb})
    arguments = whole.parse_args(["tune", MODEL, *options, "--work-dir", "my runs"])
    command = shlex.split(tune._next_command(MODEL, "cpu-znver4", arguments))
    found = whole.parse_args(command[1:])
    assert (found.model, found.batch, found.size) == (MODEL, 2, [(32, 48)])
    assert (found.dtype, found.target, found.database) == ("bfloat16", "cpu-znver4", "my runs")


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_compile_uses_records(tuned, cli, tmp_path):
    artifact = tmp_path / "artifact"
    options = ["--random-weights", "1", "--database", tuned[0], "-o", artifact, "--json"]
    results = set(cli("compile", MODEL, *options).data["records"].values())
    assert "hit" in results
    assert results <= {"hit", "miss"}
    assert "kernels (recorded for cpu-" in cli("info", artifact).out
    assert cli("verify", artifact, "--random-weights", "1").code == 0


def test_info_counts_records():
    origin = {"target": "cpu-znver4", "date": "2026-01-02T03:04:05+00:00", "hardware": "a machine"}
    metadata = ArtifactMetadata(
        name="toy",
        entries={},
        target=TargetInfo(kind="llvm", triple="", mcpu="", features=(), slug="cpu-znver4", text=""),
        records={"a": "hit", "b": "miss", "c": "hit", "d": "it is gone.", "e": "it is gone."},
        records_from=origin,
    )
    assert tuning_summary(metadata) == (
        "hit for 2 of 5 kernels (recorded for cpu-znver4 on 2026-01-02, a machine); "
        "1 without a record; 2 rejected: it is gone."
    )
    plain = dataclasses.replace(metadata, records={}, records_from={})
    assert tuning_summary(plain) == "not used"
    missed = dataclasses.replace(metadata, records={"a": "miss", "b": "miss"})
    assert tuning_summary(missed) == "none for these kernels"


@pytest.mark.slow
def test_records_check_lists_hits_and_misses(tuned, cli):
    outcome = cli("records", "check", tuned[0], MODEL, "--json")
    assert outcome.code == 0
    assert all(row["record"] == "hit" for row in outcome.data)
    other = cli("records", "check", tuned[0], MODEL, "--batch", "2", "--json")
    assert "miss" in {row["record"] for row in other.data}


@pytest.mark.slow
def test_records_check_fails_for_invalid_record(tuned, cli, tmp_path):
    folder = tuned[0] / "records"
    records = [json.loads(line) for line in (folder / "records.jsonl").open()]
    invalid = [{**record, "decisions": {"hue": 1}} for record in records]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in invalid))
    (tmp_path / "about.json").write_text((folder / "about.json").read_text())
    outcome = cli("records", "check", tmp_path, MODEL)
    assert outcome.code == 1
    assert "got hue" in outcome.out


@pytest.mark.slow
def test_records_are_shown_merged_exported_and_pruned(tuned, cli, tmp_path):
    folder = tuned[0]
    assert "records for cpu-" in cli("records", "show", folder).out
    count = len(cli("records", "show", folder, "--json").data["records"])
    merged = tmp_path / "merged"
    assert cli("records", "merge", merged, folder, folder / "records").code == 0
    assert len(cli("records", "show", merged, "--json").data["records"]) == count
    assert cli("records", "merge", folder, folder, merged).code != 0
    assert (folder / "trials.jsonl").is_file()
    table = tmp_path / "records.csv"
    assert cli("records", "export", merged, table).code == 0
    assert len(table.read_text().splitlines()) == count + 1
    kept = cli("records", "prune", merged, "--min-speedup", "1.2", "--json").data["records"]
    assert all(record["default_seconds"] >= 1.2 * record["seconds"] for record in kept)
    assert len(kept) < count


def test_missing_records_are_bad_input(cli, tmp_path):
    missing = cli("records", "show", tmp_path / "nothing")
    assert missing.code == 2
    assert "there are no tuning records" in missing.err


def test_dry_run_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("tune", OPERATOR, "--dry-run", "--threads", "1")
    assert outcome.code == 0
    assert "would take about" in outcome.out
    assert "dcnv3(1x9x9x64" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([OPERATOR], "--work-dir is required"),
        (["internimage_x", "--work-dir", "w"], "internimage_t"),
        (["dcnv3-n1", "--work-dir", "w"], "dcnv3-n1"),
        (["dcnv3-nany-h9-w9-c32-g2-k3-s1-p1-d1-f32", "--work-dir", "w"], "for static shapes"),
        ([OPERATOR, "--work-dir", "w", "--trials", "0"], "1 or more"),
        ([OPERATOR, "--work-dir", "w", "--timeout", "0"], "not a number above 0"),
        ([OPERATOR, "--work-dir", "w", "--batch", "0"], "1 or more"),
        ([OPERATOR, "--work-dir", "/dev"], "holds something other than a tuning session"),
        ([OPERATOR, "--work-dir", "/dev/null"], "work directory cannot be used"),
        ([OPERATOR, "--work-dir", "w", "--dtype", "float16"], "float16"),
        ([OPERATOR, "--work-dir", "w", "--target", "cuda-sm90"], "cannot measure schedules"),
        ([OPERATOR, "--work-dir", "w", "--rpc", "here"], "--rpc needs --rpc-key"),
        (
            [OPERATOR, "--work-dir", "w", "--rpc", "h:1", "--rpc-key", "k", "--rpc-workers", "0"],
            "1 or more",
        ),
        (
            [OPERATOR, "--work-dir", "w", "--rpc", "here", "--rpc-key", "k"],
            "--rpc is not an address",
        ),
    ],
)
def test_bad_usage(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = cli("tune", *arguments)
    assert outcome.code in (1, 2)
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def tune_arguments(folder, *operators):
    options = ["--threads", "1", "--trials", "12", "--timeout", "600", "--json"]
    return ["tune", *operators, "--work-dir", str(folder), *options]


def start_tuning(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "dcnv3_tvm", *tune_arguments(*arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background makes them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_trials(process, path, count):
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_session_is_continued(cli, tmp_path):
    folder = tmp_path / "work"
    process = start_tuning(folder, OPERATOR)
    wait_for_trials(process, folder / "trials.jsonl", 2)
    process.kill()
    process.communicate()
    with (folder / "trials.jsonl").open("a") as stream:
        stream.write('{"workload": "incomplete')
    before = (folder / "trials.jsonl").read_text().splitlines()[:-1]
    assert 2 <= len(before) <= 6
    assert cli(*tune_arguments(folder, OPERATOR)).data["trials"] == 6  # The whole space.
    after = (folder / "trials.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 6


@pytest.mark.slow
def test_ctrl_c_writes_records(tmp_path):
    folder = tmp_path / "work"
    process = start_tuning(folder, OPERATOR, OPERATOR.replace("h9", "h8"))
    wait_for_trials(process, folder / "trials.jsonl", 1)
    # A terminal signals the session and all of its child processes.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert json.loads(out)["interrupted"]
    assert (folder / "records" / "records.jsonl").read_text()


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("here", "--tracker is not an address"),
        ("127.0.0.1:1", "the RPC tracker cannot be reached"),
    ],
)
def test_worker_needs_tracker(cli, tracker, message):
    outcome = cli("worker", "--tracker", tracker, "--key", "k")
    assert outcome.code in (1, 2)
    assert message in outcome.err
