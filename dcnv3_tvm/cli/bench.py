"""``dcnv3-tvm bench``: benchmarks on this machine, and rooflines of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files, gpu
from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.backends import Peer, select_peers
from dcnv3_tvm.bench.gpu_cases import PARTS, OperatorGroup, select_cases
from dcnv3_tvm.cli import bench_arguments as declare
from dcnv3_tvm.cli.arguments import image_shape
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.bench.gpu import GpuRun
    from dcnv3_tvm.bench.gpu_compilation import CompiledJobs
    from dcnv3_tvm.bench.report import Listing, Report
    from dcnv3_tvm.spec import DCNv3Spec

HELP: Final = "compare the operator or an encoder with PyTorch and other runtimes"
EXAMPLE: Final = "dcnv3-tvm bench encoder --variant internimage_t"

_ALL: Final = "all"
_STEP_SECONDS: Final = 20.0
"""Seconds after which a burst of training steps ends."""

_OnStep = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Benchmark:
    """A sub-command of ``bench``.

    Parameters
    ----------
    help, example : str
        One line of help, and a command line.
    arguments : tuple of callable
        Functions that declare its arguments, except ``--json``.
    measure : callable
        ``(arguments, threads, on_step) -> report``.
    """

    help: str
    example: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    measure: Callable[[argparse.Namespace, int, _OnStep], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their arguments."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, benchmark in _BENCHMARKS.items():
        description = f"{benchmark.help[0].upper()}{benchmark.help[1:]}."
        command = commands.add_parser(
            name, help=benchmark.help, description=description, example=benchmark.example
        )
        for add in (*benchmark.arguments, declare.add_json):
            add(command)


def execute(arguments: argparse.Namespace) -> Result:
    """Run a benchmark, write the files that were asked for, and return the report."""
    from dcnv3_tvm.runtime.library import default_threads

    given = getattr(arguments, "threads", None)
    threads = given or default_threads()
    if given is not None:
        # The operator reads its number of threads from here when it is first called.
        os.environ[TVM_NUM_THREADS.name] = str(threads)
    with Progress(f"bench {arguments.what}", quiet=arguments.quiet) as progress:
        report = _BENCHMARKS[arguments.what].measure(arguments, threads, progress.step)
    data = report.to_json()

    def save() -> None:
        if isinstance(arguments.json, str) and arguments.json != declare.STDOUT:
            with files.output_file("the results", Path(arguments.json)) as temporary:
                temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if getattr(arguments, "plot", None) is not None:
            from dcnv3_tvm.bench.plot import save_plot

            save_plot(report, arguments.plot)

    return Result(data, report_text(report), ok=report.ok, save=save)


def _operator(arguments: argparse.Namespace, threads: int, on_step: _OnStep) -> Report:
    specs, peers = _specs(arguments), _peers(arguments, gradients=arguments.backward)
    with _requirements():
        from dcnv3_tvm.bench import comparison, problems
        from dcnv3_tvm.bench.measure import Plan
    return comparison.run(
        "op-backward" if arguments.backward else "op",
        specs,
        functools.partial(problems.operator_problem, backward=arguments.backward),
        against=peers,
        threads=threads,
        plan=Plan(rounds=arguments.rounds),
        on_step=on_step,
    )


def _encoder(arguments: argparse.Namespace, threads: int, on_step: _OnStep) -> Report:
    case, peers = _case(arguments), _peers(arguments)
    with _requirements():
        from dcnv3_tvm.bench import comparison, problems
        from dcnv3_tvm.bench.measure import Plan
    return comparison.run(
        "encoder",
        [case],
        problems.encoder_problem,
        against=peers,
        threads=threads,
        plan=Plan(rounds=arguments.rounds),
        on_step=on_step,
    )


def _train(arguments: argparse.Namespace, threads: int, on_step: _OnStep) -> Report:
    case = _case(arguments)
    with _requirements():
        from dcnv3_tvm.bench import comparison, training
        from dcnv3_tvm.bench.measure import Plan
    return comparison.run(
        "train",
        [case],
        training.training_problem,
        against=select_peers(["torch"]),
        threads=threads,
        plan=Plan(rounds=arguments.rounds, burst_seconds=_STEP_SECONDS),
        on_step=on_step,
    )


def _kernels(arguments: argparse.Namespace, threads: int, on_step: _OnStep) -> Listing[Any]:
    case = _case(arguments)
    if arguments.device_model is None and case.dtype not in cases.CPU_DTYPES:
        raise InvalidArgumentError(
            "the CPU does not support the dtype",
            got=f"--dtype {case.dtype}",
            allowed=f"{', '.join(cases.CPU_DTYPES)}, or a GPU as --device-model",
        )
    with _requirements():
        from dcnv3_tvm.bench.gpu_models import gpu_model
        from dcnv3_tvm.bench.kernels import list_rooflines, time_kernels
    if arguments.device_model is not None:
        return list_rooflines(case, gpu_model(arguments.device_model), on_step=on_step)
    return time_kernels(case, threads=threads, on_step=on_step)


def _memory(arguments: argparse.Namespace, threads: int, on_step: _OnStep) -> Listing[Any]:
    case, peers = _case(arguments), _peers(arguments)
    with _requirements():
        from dcnv3_tvm.bench.memory import measure_memory
    return measure_memory(case, against=peers, threads=threads, on_step=on_step)


def _gpu(arguments: argparse.Namespace, _: int, on_step: _OnStep) -> GpuRun:
    # Fail without a GPU before the slow imports.
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


def _gpu_compile(arguments: argparse.Namespace, _: int, on_step: _OnStep) -> CompiledJobs:
    groups, encoders = _gpu_cases(arguments)
    with _requirements():
        from dcnv3_tvm.bench.gpu_compilation import compile_ahead
    return compile_ahead(
        groups, encoders, artifacts=arguments.artifacts, target=arguments.target, on_step=on_step
    )


def _gpu_cases(
    arguments: argparse.Namespace,
) -> tuple[list[OperatorGroup], list[cases.EncoderCase]]:
    parts = PARTS if arguments.part is None else [arguments.part]
    groups, encoders = select_cases(parts, arguments.case)
    if not groups and not encoders:
        raise InvalidArgumentError(
            "no case matches the pattern",
            got=repr(arguments.case),
            hint="For example --case 'internimage_t-*', or --case '*-c128-*' for the operator.",
        )
    return groups, encoders


def _peers(arguments: argparse.Namespace, *, gradients: bool = False) -> list[Peer]:
    names = None if arguments.against is None else arguments.against.split(",")
    return select_peers(
        () if names == [declare.NONE] else names,
        getattr(arguments, "dtype", "float32"),
        gradients=gradients,
    )


@contextlib.contextmanager
def _requirements() -> Iterator[None]:
    """Raise an error that says how to install a package whose import fails in the body."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the benchmark needs {error.name}, which is not installed",
            hint='Run: pip install "dcnv3-tvm[bench]"',
        ) from error


def _case(arguments: argparse.Namespace) -> cases.EncoderCase:
    image_shape(arguments, model_config(arguments.variant).resolution)  # Raises if it is too large.
    return cases.encoder_case(
        arguments.variant,
        batch=arguments.batch,
        size=arguments.size,
        features=getattr(arguments, "features", False),
        dtype=arguments.dtype,
    )


def _specs(arguments: argparse.Namespace) -> list[DCNv3Spec]:
    batch = arguments.batch or (cases.TRAINING_BATCH if arguments.backward else 1)
    if arguments.variant == _ALL:
        specs = cases.suite(batch=batch)
    else:
        specs = cases.stage_specs(arguments.variant, batch=batch, size=arguments.size)
    matching = [spec for spec in specs if fnmatch.fnmatchcase(spec.slug, arguments.case)]
    if not matching:
        raise InvalidArgumentError(
            "no case matches the pattern",
            got=repr(arguments.case),
            allowed=", ".join(spec.slug for spec in specs),
        )
    return matching


_BENCHMARKS: Final = {
    "op": _Benchmark(
        f"time the operator at the stages of a variant, or of {_ALL} (T to H, and T at "
        f"{'x'.join(map(str, cases.DETECTION_SIZE))}), compared with other runtimes",
        "dcnv3-tvm bench op --variant internimage_t --against torch",
        (
            declare.add_operator,
            declare.add_threads,
            declare.add_case,
            declare.add_backward,
            declare.add_against,
            declare.add_rounds,
            declare.add_plot,
        ),
        _operator,
    ),
    "encoder": _Benchmark(
        "time a whole encoder, compared with other runtimes",
        "dcnv3-tvm bench encoder --variant internimage_t --dtype bfloat16",
        (
            declare.add_model,
            declare.add_threads,
            declare.add_features,
            declare.add_cpu_dtype,
            declare.add_against,
            declare.add_rounds,
            declare.add_plot,
        ),
        _encoder,
    ),
    "train": _Benchmark(
        "time a training step of a classifier, and measure its peak memory, with this library's "
        "operator and with the published sampling in PyTorch",
        "dcnv3-tvm bench train --variant internimage_t",
        (
            declare.add_training_model,
            declare.add_threads,
            declare.add_training_dtype,
            declare.add_rounds,
            declare.add_plot,
        ),
        _train,
    ),
    "kernels": _Benchmark(
        "time every kernel of an encoder and compare it with its roofline; with --device-model, "
        "list the rooflines on a GPU, which need not be in this machine",
        "dcnv3-tvm bench kernels --variant internimage_t --device-model h100",
        (
            declare.add_model,
            declare.add_threads,
            declare.add_features,
            declare.add_dtype,
            declare.add_device_model,
        ),
        _kernels,
    ),
    "memory": _Benchmark(
        "measure the peak memory of an encoder, compared with other runtimes, each in a process of "
        "its own",
        "dcnv3-tvm bench memory --variant internimage_t --against none",
        (
            declare.add_model,
            declare.add_threads,
            declare.add_features,
            declare.add_cpu_dtype,
            declare.add_against,
        ),
        _memory,
    ),
    "gpu": _Benchmark(
        "time operator and encoders on this machine's GPU, compared with PyTorch and the published "
        "extensions",
        "dcnv3-tvm bench gpu --seconds 300",
        (declare.add_gpu_cases, declare.add_gpu),
        _gpu,
    ),
    "gpu-compile": _Benchmark(
        "compile what `bench gpu` measures, for a GPU that need not be in this machine",
        "dcnv3-tvm bench gpu-compile --target cuda-sm90 --artifacts gpu",
        (declare.add_gpu_cases, declare.add_gpu_compile),
        _gpu_compile,
    ),
}
"""Sub-commands by name, in the order of the help."""
