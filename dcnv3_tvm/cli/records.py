"""``dcnv3-tvm records``: show, check, merge, prune and export tuning records."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.cli.arguments import add_shape, parse_path, parse_positive
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.tune import import_model
from dcnv3_tvm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dcnv3_tvm.schedules.records import Record, Records

HELP: Final = "show, check, merge, prune or export tuning records"
EXAMPLE: Final = "dcnv3-tvm records show runs/t"

_FOLDER: Final = "folder of records, work directory of `tune`, or target with shipped records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        example="dcnv3-tvm records show cpu-znver4",
        help="list records",
        description="List records.",
    )
    show.add_argument("records", help=_FOLDER)
    check = actions.add_parser(
        "check",
        example="dcnv3-tvm records check runs/t internimage_t",
        help="list the kernels of a model that have records",
        description="List the kernels of a model that have records. Exit code 1 if a record is "
        "invalid for its kernel.",
    )
    check.add_argument("records", help=_FOLDER)
    check.add_argument("model", help="name listed by `dcnv3-tvm models`")
    check.add_argument("--dtype", default="float32", help="element type (default: %(default)s)")
    add_shape(check)
    merge = actions.add_parser(
        "merge",
        example="dcnv3-tvm records merge merged runs/t runs/b",
        help="merge folders, keeping the fastest record of each kernel",
        description="Merge folders of one target, keeping the fastest record of each kernel.",
    )
    merge.add_argument("output", type=parse_path, help="folder to write; may be one of the inputs")
    merge.add_argument("records", nargs="+", help=_FOLDER)
    prune = actions.add_parser(
        "prune",
        example="dcnv3-tvm records prune runs/t/records",
        help="drop records that are hardly faster than the default",
        description="Drop records that are hardly faster than the default schedule.",
    )
    prune.add_argument("records", type=parse_path, help="folder of records")
    prune.add_argument(
        "--min-speedup",
        type=parse_positive,
        default=1.03,
        metavar="X",
        help="keep records with at least this speedup (default: 1.03)",
    )
    export = actions.add_parser(
        "export",
        example="dcnv3-tvm records export runs/t records.csv",
        help="write records as CSV",
        description="Write records as a CSV file.",
    )
    export.add_argument("records", help=_FOLDER)
    export.add_argument("output", type=parse_path, help="the CSV file")
    for action in (show, check, merge, prune, export):
        # Without SUPPRESS, the default here would overwrite --json of the command itself.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )


def execute(arguments: argparse.Namespace) -> Result:
    """Run the action."""
    actions = {
        "show": _show,
        "check": _check,
        "merge": _merge,
        "prune": _prune,
        "export": _export,
    }
    return actions[arguments.action](arguments)


def _read(name: str) -> Records:
    """Read a folder, or the records shipped for a target."""
    from dcnv3_tvm.schedules.records import SHIPPED, Records, holds_records, records_folder

    for folder in (records_folder(Path(name)), SHIPPED / name):
        if holds_records(folder):
            return Records.read(folder)
    shipped = sorted(path.name for path in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    raise InvalidArgumentError(
        "there are no tuning records",
        got=name,
        allowed="a folder written by `dcnv3-tvm tune`"
        + (f", or one of {', '.join(shipped)}" if shipped else ""),
    )


def _show(arguments: argparse.Namespace) -> Result:
    records = _read(arguments.records)
    about = records.about
    rows = [
        (
            f"{1e6 * record.default_seconds:9.1f}",
            f"{1e6 * record.seconds:9.1f}",
            f"{record.speedup:6.2f}x",
            record.trials,
            _decisions(record),
            record.kernel,
        )
        for record in records.by_workload.values()
    ]
    header = ["default us", "tuned us", "speedup", "trials", "decisions", "kernel"]
    text = (
        f"{len(rows)} records for {about.target}: {about.hardware}, {about.cores} cores, "
        f"apache-tvm {about.tvm}, commit {about.commit or 'unknown'}, {about.trials} trials, "
        f"{about.date}"
    )
    return Result(_data(records), f"{table(header, rows)}\n\n{text}")


def _check(arguments: argparse.Namespace) -> Result:
    from dcnv3_tvm import schedules, targets
    from dcnv3_tvm.compiler.compile import effective_dtype
    from dcnv3_tvm.tuning.tasks import model_tasks

    records = _read(arguments.records)
    target = targets.resolve_target(records.about.target)
    dtype = effective_dtype(arguments.dtype, target)
    imported = import_model(arguments.model, arguments)
    rows = [
        {
            "kernel": task.kernel,
            "calls": task.calls,
            "record": schedules.schedule_by_record(task.function, target, records).record,
        }
        for task in model_tasks(imported, target, dtype)
    ]
    invalid = [row for row in rows if row["record"] not in (schedules.HIT, schedules.MISS)]
    hits = sum(row["record"] == schedules.HIT for row in rows)
    text = table(
        ["record", "calls", "kernel"],
        [(row["record"], row["calls"], row["kernel"]) for row in rows],
    )
    total = f"{hits} of {len(rows)} kernels have records, {len(invalid)} records are invalid"
    return Result(rows, f"{text}\n\n{total}", ok=not invalid)


def _merge(arguments: argparse.Namespace) -> Result:
    from dcnv3_tvm.schedules.records import Records

    read = [_read(name) for name in arguments.records]
    newest = max((records.about for records in read), key=lambda about: about.date)
    for records in read:
        about = records.about
        if (about.target, about.hardware, about.cores) != (
            newest.target,
            newest.hardware,
            newest.cores,
        ):
            raise InvalidArgumentError(
                "records of different devices cannot be merged",
                got=f"{about.target} on {about.hardware}, {about.cores} cores; "
                f"{newest.target} on {newest.hardware}, {newest.cores} cores",
                allowed="records of one target, processor and number of cores",
            )
    # Sessions are told apart by date, so merging one twice does not count its trials twice.
    trials = sum({records.about.date: records.about.trials for records in read}.values())
    merged = Records.of(
        dataclasses.replace(newest, trials=trials),
        (record for records in read for record in records.by_workload.values()),
    )
    _write(merged, arguments.output)
    return Result(_data(merged), f"{arguments.output}: {len(merged.by_workload)} records")


def _prune(arguments: argparse.Namespace) -> Result:
    from dcnv3_tvm.schedules.records import Records

    records = Records.read(arguments.records)
    kept = Records.of(
        records.about,
        (
            record
            for record in records.by_workload.values()
            if record.speedup >= arguments.min_speedup
        ),
    )
    _write(kept, arguments.records)
    dropped = len(records.by_workload) - len(kept.by_workload)
    return Result(
        _data(kept), f"{arguments.records}: {dropped} dropped, {len(kept.by_workload)} kept"
    )


def _export(arguments: argparse.Namespace) -> Result:
    records = _read(arguments.records)
    rows = [
        {**dataclasses.asdict(record), "decisions": _decisions(record), "speedup": record.speedup}
        for record in records.by_workload.values()
    ]
    about = dataclasses.asdict(records.about)
    about["all_trials"] = about.pop("trials")
    with (
        files.output_file("the CSV file", arguments.output) as path,
        path.open("w", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, [*(rows[0] if rows else {}), *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    return Result(_data(records), f"{arguments.output}: {len(rows)} records")


def _write(records: Records, folder: Path) -> None:
    try:
        records.write(folder)
    except OSError as error:
        raise InvalidArgumentError(
            "the records cannot be written", got=f"{error.strerror} ({folder})"
        ) from error


def _data(records: Records) -> dict[str, Any]:
    return {
        **dataclasses.asdict(records.about),
        "records": [dataclasses.asdict(record) for record in records.by_workload.values()],
    }


def _decisions(record: Record) -> str:
    return ", ".join(f"{name}={value}" for name, value in record.decisions.items())
