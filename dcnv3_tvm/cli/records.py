"""``dcnv3-tvm records``: look at tuning records, check, join, prune and export them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.cli.compile import parse_size
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.tune import import_model
from dcnv3_tvm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dcnv3_tvm.schedules.records import Record, Records

HELP: Final = "show, check, merge, prune or export tuning records"

_FOLDER: Final = "folder of records, work directory of a session, or a target that has shipped ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="list records", description="List records.")
    show.add_argument("records", help=_FOLDER)
    check = actions.add_parser(
        "check",
        help="say which kernels of a model have records",
        description="Say which kernels of a model have records. Fails if one is refused.",
    )
    check.add_argument("records", help=_FOLDER)
    check.add_argument("model", help="a name of `dcnv3-tvm models`")
    check.add_argument("--dtype", default="float32", help="of products (default: %(default)s)")
    check.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    check.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of images (default: the model's own)"
    )
    merge = actions.add_parser(
        "merge",
        help="join folders, the fastest record of each kernel",
        description="Join folders of one target: of each kernel the record with the shortest time.",
    )
    merge.add_argument("output", type=Path, help="folder to write; it may be one of the others")
    merge.add_argument("records", nargs="+", help=_FOLDER)
    prune = actions.add_parser(
        "prune",
        help="drop records that say no more than the rule itself",
        description="Drop records that are no faster than the schedule by default.",
    )
    prune.add_argument("records", type=Path, help="folder of records")
    prune.add_argument(
        "--faster", type=float, default=1.03, metavar="X", help="keep from here (default: 1.03)"
    )
    export = actions.add_parser(
        "export", help="write records as CSV", description="Write records as a CSV file."
    )
    export.add_argument("records", help=_FOLDER)
    export.add_argument("output", type=Path, help="the CSV file")
    for action in (show, check, merge, prune, export):
        # The command has an option of this name, too, whose value must stand.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )


def execute(arguments: argparse.Namespace) -> Result:
    """Do what was asked."""
    actions = {
        "show": _show,
        "check": _check,
        "merge": _merge,
        "prune": _prune,
        "export": _export,
    }
    return actions[arguments.action](arguments)


def _read(name: str) -> Records:
    """Read a folder, or what is shipped for a target."""
    from dcnv3_tvm.schedules.records import SHIPPED, Records, holds_records, records_folder

    for folder in (records_folder(Path(name)), SHIPPED / name):
        if holds_records(folder):
            return Records.read(folder)
    shipped = sorted(path.name for path in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    raise InvalidArgumentError(
        "there are no tuning records",
        got=name,
        allowed="a folder that `dcnv3-tvm tune` wrote"
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
    header = ["default us", "tuned us", "faster", "trials", "decisions", "kernel"]
    text = (
        f"{len(rows)} records for {about.target}: {about.hardware}, {about.cores} cores, "
        f"apache-tvm {about.tvm}, commit {about.commit or 'unknown'}, {about.trials} trials, "
        f"{about.date}"
    )
    return Result(_data(records), f"{table(header, rows)}\n\n{text}")


def _check(arguments: argparse.Namespace) -> Result:
    from dcnv3_tvm import schedules, targets
    from dcnv3_tvm.compiler.compile import check_dtype
    from dcnv3_tvm.tuning.tasks import model_tasks

    records = _read(arguments.records)
    target = targets.resolve_target(records.about.target)
    check_dtype(arguments.dtype, target)
    imported = import_model(arguments.model, arguments.batch, arguments.size)
    rows = [
        {
            "kernel": task.kernel,
            "calls": task.calls,
            "record": schedules.schedule_by_record(task.function, target, records).record,
        }
        for task in model_tasks(imported, target, arguments.dtype)
    ]
    refused = [row for row in rows if row["record"] not in (schedules.HIT, schedules.MISS)]
    hits = sum(row["record"] == schedules.HIT for row in rows)
    text = table(
        ["record", "calls", "kernel"],
        [(row["record"], row["calls"], row["kernel"]) for row in rows],
    )
    total = f"{hits} of {len(rows)} kernels have records, {len(refused)} records are refused"
    return Result(rows, f"{text}\n\n{total}", ok=not refused)


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
                "records of different devices do not go together",
                got=f"{about.target} on {about.hardware}, {about.cores} cores; "
                f"{newest.target} on {newest.hardware}, {newest.cores} cores",
            )
    # One that is merged into a folder again brings no new trials.
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
        (record for record in records.by_workload.values() if record.speedup >= arguments.faster),
    )
    _write(kept, arguments.records)
    dropped = len(records.by_workload) - len(kept.by_workload)
    return Result(
        _data(kept), f"{arguments.records}: {dropped} dropped, {len(kept.by_workload)} kept"
    )


def _export(arguments: argparse.Namespace) -> Result:
    records = _read(arguments.records)
    rows = [
        {**dataclasses.asdict(record), "decisions": _decisions(record), "faster": record.speedup}
        for record in records.by_workload.values()
    ]
    about = dataclasses.asdict(records.about)
    about["all_trials"] = about.pop("trials")
    try:
        with files.atomic_file(arguments.output) as path, path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*(rows[0] if rows else {}), *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    except OSError as error:
        raise InvalidArgumentError(
            "the file cannot be written", got=f"{error.strerror} ({arguments.output})"
        ) from error
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
