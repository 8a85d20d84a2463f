"""Compare backends: build them, check their outputs, and time those that are correct."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from dcnv3_tvm.bench.accuracy import largest_error
from dcnv3_tvm.bench.backends import OURS, Backend, Builders, Peer, missing_packages
from dcnv3_tvm.bench.budget import OutOfTimeError
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.measure import Plan, measure
from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.report import BackendRow, CaseResult, Report, failure_text
from dcnv3_tvm.bench.roofline import Roofline
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import MAX_ERROR

CaseT = TypeVar("CaseT", DCNv3Spec, EncoderCase)


def run(
    kind: str,
    cases: Sequence[CaseT],
    problem_of: Callable[[CaseT], Problem],
    *,
    against: Sequence[Peer] = (),
    threads: int,
    plan: Plan | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Benchmark this library and its peers on the CPU.

    If an output of a case is wrong, nothing in that case is timed.

    Parameters
    ----------
    kind : str
        Kind of the report.
    cases : sequence of DCNv3Spec or of EncoderCase
        Cases to run.
    problem_of : callable
        Creates the problem of a case.
    against : sequence of Peer
        Peers; those with missing packages are skipped.
    threads : int
        Threads of every backend. The operator as users call it reads its number of threads from
        the environment variable ``TVM_NUM_THREADS``, which must be set before.
    plan : Plan, optional
        Number of timed calls.
    on_step : callable
        Called with a description of each step before it runs.
    """
    # Comparisons on a GPU, with code compiled elsewhere, work without TVM's compiler.
    from dcnv3_tvm.bench.builders import builders
    from dcnv3_tvm.bench.cpu_peaks import measure_peaks

    plan = plan or Plan()
    provenance = Provenance.here(threads)
    skipped = missing_packages(against)
    for name, reason in skipped.items():
        on_step(f'skip {name}, {reason} (pip install "dcnv3-tvm[bench]")')
    on_step("measure the peak rates of the machine")
    peaks = measure_peaks(threads)
    present = [peer for peer in against if peer.name not in skipped]
    results = []
    for case in cases:
        on_step(f"{case.slug}: inputs and reference")
        problem = problem_of(case)
        result = compare_backends(
            problem.slug,
            builders(problem, present, threads),
            problem.reference,
            Roofline.of(problem.flops, problem.bytes, peaks, problem.dtype),
            plan,
            error_measure=problem.measure,
            on_step=on_step,
        )
        results.append(result)
    return Report(
        kind=kind,
        provenance=provenance,
        plan=plan,
        peaks=peaks,
        cases=tuple(results),
        skipped=skipped,
    )


def compare_backends(
    slug: str,
    builders: Builders,
    references: Sequence[Any],
    roofline: Roofline,
    plan: Plan,
    *,
    error_measure: str = MAX_ERROR,
    keep_going: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
    before: Callable[[], Any] | None = None,
    **timing: Any,
) -> CaseResult:
    """Build backends, compare their outputs with the reference, and time them.

    Parameters
    ----------
    slug : str
        Name of the case.
    builders : mapping of str to callable
        Builder of each backend, in the order in which they are run. One that fails makes a row with
        the failure.
    references : sequence of array or tensor
        Reference outputs.
    roofline : Roofline
        Lower bounds of the time.
    plan : Plan
        Number of timed calls.
    error_measure : str
        Error measure, see `dcnv3_tvm.verify.tolerances`.
    keep_going : bool
        Time the correct backends even if others, or this library, are wrong or fail. By default a
        failure of this library is raised, and a wrong output prevents all timing.
    on_step : callable
        Called with a description of each step before it runs.
    before : callable, optional
        Untimed call before every timed call.
    **timing
        ``clock``, ``sleep`` and ``seconds_of`` of `dcnv3_tvm.bench.measure.measure`.
    """
    backends: dict[str, Backend] = {}
    rows: dict[str, BackendRow] = {}

    @contextlib.contextmanager
    def failures(name: str) -> Iterator[None]:
        """Make what a backend's library raises a result, unless it ends the comparison."""
        try:
            yield
        except OutOfTimeError as late:
            rows[name] = BackendRow(name, failure=str(late))
        except Exception as error:  # libraries raise any type
            if name.startswith(OURS) and not keep_going:
                raise
            rows[name] = BackendRow(name, failure=failure_text(error))

    for name, build in builders.items():
        on_step(f"{slug}: build {name}")
        rows[name] = BackendRow(name)
        with failures(name):
            backends[name] = build()
    for name, backend in backends.items():
        on_step(f"{slug}: check {name}")
        with failures(name):
            rows[name] = _checked(name, backend, references, error_measure)
    calls = {
        name: backend.runner.call
        for name, backend in backends.items()
        if rows[name].failure is None and not rows[name].wrong
    }
    if keep_going or not any(row.wrong for row in rows.values()):
        timings = measure(
            calls,
            plan,
            on_round=lambda number: on_step(f"{slug}: round {number + 1} of {plan.rounds}"),
            before=None if before is None else dict.fromkeys(calls, before),
            **timing,
        )
        for name, found in timings.items():
            rows[name] = dataclasses.replace(
                rows[name],
                seconds=found.seconds,
                ratio=found.ratio_to(timings[OURS]) if OURS in timings else None,
                redone=found.redone,
            )
    return CaseResult(slug, roofline, tuple(rows.values()), error_measure)


def _checked(
    name: str, backend: Backend, references: Sequence[Any], error_measure: str
) -> BackendRow:
    """Call a backend once and compare its outputs with the reference."""
    runner = backend.runner
    expected = references if backend.reference is None else backend.reference
    error = largest_error(runner.outputs(runner.call()), expected, error_measure)
    return BackendRow(name, error, backend.tolerance, peak_bytes=runner.peak_bytes)
