"""``dcnv3-tvm bench``: times beside those of other runtimes, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import atomic
from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.contestants import NORM, PEERS, Peer, select_peers
from dcnv3_tvm.cli.compile import parse_size
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.bench.listing import Listing
    from dcnv3_tvm.bench.report import Report
    from dcnv3_tvm.spec import DCNv3Spec

HELP: Final = "measure the operator or an encoder beside PyTorch, ONNX Runtime and OpenVINO"

STDOUT: Final = "-"

_ALL: Final = "all"
_NONE: Final = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured, each with its arguments."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, kind in _KINDS.items():
        command = kinds.add_parser(name, help=kind.help, description=kind.help)
        for add in (_add_common, *kind.arguments):
            add(command)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        default="internimage_t",
        help="a name of `dcnv3-tvm models` (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the image (default: the variant's own)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that compute (default: the cores)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        # The command has an option of this name, too, whose value must stand.
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write JSON to a file, or print it instead of the table",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write CSV")


def _add_case(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case", default="*", metavar="PATTERN", help="only cases whose name matches"
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(cases.DTYPES),
        default="float32",
        help="of this library's products (default: %(default)s)",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", action="store_true", help="the feature pyramid, without a head"
    )


def _add_against(parser: argparse.ArgumentParser) -> None:
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help=f"of {names}, or {_NONE} (default: all that take part in the dtype)",
    )


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="bursts of each (default: 5)"
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bars (.png, .svg, .pdf)")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What can be measured.

    Parameters
    ----------
    help : str
        In a line.
    arguments : tuple of callable
        Declare what it takes besides what all take.
    measure : callable
        ``(arguments, threads, on_step) -> report``.
    """

    help: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    measure: Callable[[argparse.Namespace, int, Callable[[str], None]], Any]


def execute(arguments: argparse.Namespace) -> Result:
    """Measure, write the files, and show the table."""
    for name in ("batch", "threads", "rounds"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise InvalidArgumentError(f"--{name} is out of range", got=value, allowed="1 or more")
    from dcnv3_tvm.runtime.library import default_threads

    threads = arguments.threads or default_threads()
    if arguments.threads is not None:
        # The operator takes its threads from here when it is first called.
        os.environ[TVM_NUM_THREADS.name] = str(threads)
    with Progress(f"bench {arguments.what}") as progress:
        report = _KINDS[arguments.what].measure(arguments, threads, progress.step)
    data = report.to_json()
    if isinstance(arguments.json, str) and arguments.json != STDOUT:
        _write(Path(arguments.json), json.dumps(data, indent=2) + "\n")
    if arguments.csv is not None:
        _write(arguments.csv, report.to_csv())
    if getattr(arguments, "plot", None) is not None:
        from dcnv3_tvm.bench.plot import save_plot

        save_plot(report, arguments.plot)
    return Result(data, report_text(report), ok=report.ok)


def _compete(
    selected: Sequence[Any],
    arguments: argparse.Namespace,
    threads: int,
    on_step: Callable[[str], None],
) -> Report:
    peers = _peers(arguments)
    with _requirements():
        from dcnv3_tvm.bench import runner
        from dcnv3_tvm.bench.measure import Plan
    return runner.run(
        selected,
        against=peers,
        threads=threads,
        plan=Plan(rounds=arguments.rounds),
        on_step=on_step,
    )


def _operator(
    arguments: argparse.Namespace, threads: int, on_step: Callable[[str], None]
) -> Report:
    return _compete(_specs(arguments), arguments, threads, on_step)


def _encoder(arguments: argparse.Namespace, threads: int, on_step: Callable[[str], None]) -> Report:
    return _compete([_case(arguments)], arguments, threads, on_step)


def _kernels(
    arguments: argparse.Namespace, threads: int, on_step: Callable[[str], None]
) -> Listing[Any]:
    case = _case(arguments)
    with _requirements():
        from dcnv3_tvm.bench.kernels import list_kernels
    return list_kernels(case, threads=threads, on_step=on_step)


def _memory(
    arguments: argparse.Namespace, threads: int, on_step: Callable[[str], None]
) -> Listing[Any]:
    case, peers = _case(arguments), _peers(arguments)
    with _requirements():
        from dcnv3_tvm.bench.memory import measure_memory
    return measure_memory(case, against=peers, threads=threads, on_step=on_step)


def _beside_torch(
    arguments: argparse.Namespace, threads: int, on_step: Callable[[str], None]
) -> Listing[Any]:
    case = _case(arguments)
    with _requirements():
        from dcnv3_tvm.bench.beside_torch import measure_beside_torch
    return measure_beside_torch(case, threads=threads, rounds=arguments.rounds, on_step=on_step)


def _peers(arguments: argparse.Namespace) -> list[Peer]:
    names = None if arguments.against is None else arguments.against.split(",")
    return select_peers(() if names == [_NONE] else names, getattr(arguments, "dtype", "float32"))


@contextlib.contextmanager
def _requirements() -> Iterator[None]:
    """Say how to install what an import in the body does not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the benchmark needs {error.name}, which is not installed",
            hint="Run: pip install 'dcnv3-tvm[bench]'",
        ) from error


def _case(arguments: argparse.Namespace) -> cases.EncoderCase:
    return cases.encoder_case(
        arguments.variant,
        batch=arguments.batch,
        size=arguments.size,
        features=getattr(arguments, "features", False),
        dtype=arguments.dtype,
    )


def _specs(arguments: argparse.Namespace) -> list[DCNv3Spec]:
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


_KINDS: Final = {
    "op": _Kind(
        f"the operator at the stages of a variant, or of {_ALL} (T to H, and T at "
        f"{'x'.join(map(str, cases.DETECTION_SIZE))}), beside other runtimes",
        (_add_case, _add_against, _add_rounds, _add_plot),
        _operator,
    ),
    "encoder": _Kind(
        "a whole encoder beside other runtimes",
        (_add_features, _add_dtype, _add_against, _add_rounds, _add_plot),
        _encoder,
    ),
    "kernels": _Kind(
        "every kernel of a compiled encoder alone, beside its floor",
        (_add_features, _add_dtype),
        _kernels,
    ),
    "memory": _Kind(
        "the peak memory of an encoder beside that of other runtimes, each in a fresh process",
        (_add_features, _add_dtype, _add_against),
        _memory,
    ),
    "beside-torch": _Kind(
        "a compiled encoder behind operations of PyTorch in the same process, in several settings",
        (_add_features, _add_dtype, _add_rounds),
        _beside_torch,
    ),
}
"""By name, in the order of the help."""


def report_text(report: Report | Listing[Any]) -> str:
    """Show a report to people: the machine, the floors, a table a case."""
    from dcnv3_tvm.bench.listing import Listing

    if isinstance(report, Listing):
        listed = f"{report.slug}\n{table(report.HEADER, report.cells())}"
        sections = [report.provenance.line, report.how, listed, "\n".join(report.summary())]
        return "\n\n".join(filter(None, sections))
    from dcnv3_tvm.bench.report import TABLE_HEADER, table_rows

    peaks = report.peaks
    sections = [
        report.provenance.line,
        f"floors from {peaks.flops / 1e9:.0f} GFLOP/s and {peaks.bytes / 1e9:.1f} GB/s, "
        f"{peaks.how}",
    ]
    for case in report.cases:
        section = f"{case.slug}\n{table(TABLE_HEADER, table_rows(case))}"
        if case.measure == NORM:
            section += "\nErrors are ‖error‖ / ‖reference‖; the arithmetic floor is of bfloat16."
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
