"""``dcnv3-tvm bench``: times beside those of other runtimes, on this machine."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import atomic
from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.contestants import PEERS, select_peers
from dcnv3_tvm.cli.compile import parse_size
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.bench.report import Report

HELP: Final = "time the operator or an encoder beside PyTorch, ONNX Runtime and OpenVINO"

STDOUT: Final = "-"

_ALL: Final = "all"
_NONE: Final = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", choices=("op", "encoder"), help="the operator, or a whole encoder")
    parser.add_argument(
        "--variant",
        default="internimage_t",
        help="a name of `dcnv3-tvm models` (default: %(default)s); for op, whose stages, or "
        f"{_ALL}: T to H, and T at {'x'.join(map(str, cases.DETECTION_SIZE))}",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the image (default: the variant's own)"
    )
    parser.add_argument(
        "--features", action="store_true", help="encoder: the feature pyramid, without a head"
    )
    parser.add_argument(
        "--case", default="*", metavar="PATTERN", help="op: only cases whose name matches"
    )
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument(
        "--against", default=names, metavar="NAMES", help=f"of {names}, or {_NONE} (default: all)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of every contestant (default: the cores)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="bursts of each (default: 5)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write JSON to a file, or print it instead of the table",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bars (.png, .svg, .pdf)")


def execute(arguments: argparse.Namespace) -> Result:
    """Measure, write the files, and show the table."""
    for name in ("batch", "threads", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InvalidArgumentError(f"--{name} is out of range", got=value, allowed="1 or more")
    selected = _cases(arguments)
    peers = select_peers(() if arguments.against == _NONE else arguments.against.split(","))
    from dcnv3_tvm.runtime.library import default_threads

    threads = arguments.threads or default_threads()
    if arguments.threads is not None:
        # The operator takes its threads from here when it is first called.
        os.environ[TVM_NUM_THREADS.name] = str(threads)
    try:
        from dcnv3_tvm.bench import runner
        from dcnv3_tvm.bench.measure import Plan
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the benchmark needs {error.name}, which is not installed",
            hint="Run: pip install 'dcnv3-tvm[bench]'",
        ) from error
    with Progress(f"bench {arguments.what}") as progress:
        report = runner.run(
            selected,
            against=peers,
            threads=threads,
            plan=Plan(rounds=arguments.rounds),
            on_step=progress.step,
        )
    data = report.to_json()
    if arguments.json not in (None, STDOUT):
        _write(Path(arguments.json), json.dumps(data, indent=2) + "\n")
    if arguments.csv is not None:
        _write(arguments.csv, report.to_csv())
    if arguments.plot is not None:
        from dcnv3_tvm.bench.plot import save_plot

        save_plot(report, arguments.plot)
    return Result(data, report_text(report), ok=report.ok)


def _cases(arguments: argparse.Namespace) -> Sequence[Any]:
    if arguments.what == "encoder":
        return [
            cases.encoder_case(
                arguments.variant,
                batch=arguments.batch,
                size=arguments.size,
                features=arguments.features,
            )
        ]
    if arguments.variant == _ALL:
        specs = cases.suite(batch=arguments.batch)
    else:
        specs = cases.stage_specs(arguments.variant, batch=arguments.batch, size=arguments.size)
    chosen = [spec for spec in specs if fnmatch.fnmatchcase(spec.slug, arguments.case)]
    if not chosen:
        raise InvalidArgumentError(
            "no case matches the pattern",
            got=repr(arguments.case),
            allowed=", ".join(spec.slug for spec in specs),
        )
    return chosen


def report_text(report: Report) -> str:
    """Show a report to people: the machine, the floors, a table a case."""
    from dcnv3_tvm.bench.report import TABLE_HEADER, table_rows

    peaks = report.peaks
    sections = [
        report.provenance.line,
        f"floors from {peaks.flops / 1e9:.0f} GFLOP/s and {peaks.bytes / 1e9:.1f} GB/s, "
        f"{peaks.how}",
    ]
    for case in report.cases:
        section = f"{case.slug}\n{table(TABLE_HEADER, table_rows(case))}"
        if case.wrong:
            section += (
                f"\nNo times: the outputs of {', '.join(case.wrong)} are not those of the float64 "
                "reference."
            )
        sections.append(section)
    sections += [f"skipped {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n\n".join(sections)


def _write(path: Path, text: str) -> None:
    try:
        with atomic.file(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            "the results cannot be written", got=f"{error.strerror or error} ({path})"
        ) from error
