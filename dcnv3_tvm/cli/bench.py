"""``dcnv3-tvm bench``: times beside those of other runtimes, on this machine; floors of any."""

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

from dcnv3_tvm import files, gpu
from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.contestants import Peer, select_peers
from dcnv3_tvm.bench.gpu_cases import PARTS, OperatorGroup, chosen
from dcnv3_tvm.cli import bench_arguments as declare
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.bench.gpu_report import Compilation, GpuRun
    from dcnv3_tvm.bench.listing import Listing
    from dcnv3_tvm.bench.report import Report
    from dcnv3_tvm.spec import DCNv3Spec

HELP: Final = "measure the operator or an encoder beside PyTorch and other runtimes"

_ALL: Final = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured, each with its arguments."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, kind in _KINDS.items():
        command = kinds.add_parser(name, help=kind.help, description=kind.help)
        for add in (*kind.arguments, declare.add_json):
            add(command)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What can be measured.

    Parameters
    ----------
    help : str
        In a line.
    arguments : tuple of callable
        Declare what it takes besides ``--json``.
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

    given = getattr(arguments, "threads", None)
    threads = given or default_threads()
    if given is not None:
        # The operator takes its threads from here when it is first called.
        os.environ[TVM_NUM_THREADS.name] = str(threads)
    with Progress(f"bench {arguments.what}") as progress:
        report = _KINDS[arguments.what].measure(arguments, threads, progress.step)
    data = report.to_json()
    if isinstance(arguments.json, str) and arguments.json != declare.STDOUT:
        _write(Path(arguments.json), json.dumps(data, indent=2) + "\n")
    if getattr(arguments, "csv", None) is not None:
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


def _floor(
    arguments: argparse.Namespace, _threads: int, on_step: Callable[[str], None]
) -> Listing[Any]:
    case = _case(arguments)
    with _requirements():
        from dcnv3_tvm.bench.cost import list_floors
        from dcnv3_tvm.bench.device_models import device_model
    return list_floors(case, device_model(arguments.device_model), on_step=on_step)


def _gpu(arguments: argparse.Namespace, _threads: int, on_step: Callable[[str], None]) -> GpuRun:
    # Before anything is imported that takes time.
    gpu.device(arguments.device)
    groups, encoders = _gpu_cases(arguments)
    with _requirements():
        from dcnv3_tvm.bench.gpu import run_gpu
    return run_gpu(
        groups,
        encoders,
        results=arguments.results,
        artifacts=arguments.artifacts,
        seconds=arguments.seconds,
        index=arguments.device,
        on_step=on_step,
    )


def _gpu_compile(
    arguments: argparse.Namespace, _threads: int, on_step: Callable[[str], None]
) -> Compilation:
    groups, encoders = _gpu_cases(arguments)
    with _requirements():
        from dcnv3_tvm.bench.gpu import compile_ahead
    return compile_ahead(
        groups, encoders, artifacts=arguments.artifacts, target=arguments.target, on_step=on_step
    )


def _gpu_cases(
    arguments: argparse.Namespace,
) -> tuple[list[OperatorGroup], list[cases.EncoderCase]]:
    groups, encoders = chosen(PARTS if arguments.part is None else [arguments.part], arguments.case)
    if not groups and not encoders:
        raise InvalidArgumentError("no case matches the pattern", got=repr(arguments.case))
    return groups, encoders


def _peers(arguments: argparse.Namespace) -> list[Peer]:
    names = None if arguments.against is None else arguments.against.split(",")
    return select_peers(
        () if names == [declare.NONE] else names, getattr(arguments, "dtype", "float32")
    )


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
        (
            declare.add_common,
            declare.add_case,
            declare.add_against,
            declare.add_rounds,
            declare.add_plot,
        ),
        _operator,
    ),
    "encoder": _Kind(
        "a whole encoder beside other runtimes",
        (
            declare.add_common,
            declare.add_features,
            declare.add_dtype,
            declare.add_against,
            declare.add_rounds,
            declare.add_plot,
        ),
        _encoder,
    ),
    "kernels": _Kind(
        "every kernel of a compiled encoder alone, beside its floor",
        (declare.add_common, declare.add_features, declare.add_dtype),
        _kernels,
    ),
    "memory": _Kind(
        "the peak memory of an encoder beside that of other runtimes, each in a fresh process",
        (declare.add_common, declare.add_features, declare.add_dtype, declare.add_against),
        _memory,
    ),
    "floor": _Kind(
        "what every kernel of an encoder takes on a GPU at least, computed without one",
        (declare.add_model, declare.add_features, declare.add_device_model, declare.add_csv),
        _floor,
    ),
    "gpu": _Kind(
        "operator and encoders on this machine's GPU, beside PyTorch and the published extensions",
        (declare.add_gpu_cases, declare.add_gpu),
        _gpu,
    ),
    "gpu-compile": _Kind(
        "compile what `bench gpu` measures, for a GPU that need not be in this machine",
        (declare.add_gpu_cases, declare.add_gpu_compile),
        _gpu_compile,
    ),
}
"""By name, in the order of the help."""


def _write(path: Path, text: str) -> None:
    try:
        with files.atomic_file(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            "the results cannot be written", got=f"{error.strerror or error} ({path})"
        ) from error
