"""Run the benchmark: build the contestants of each case, compare their outputs, then time them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dcnv3_tvm.bench import ours
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import MAX, OURS, Contestant, Peer, absent, error_of
from dcnv3_tvm.bench.floors import Floors, Peaks, measure_peaks
from dcnv3_tvm.bench.measure import Plan, measure
from dcnv3_tvm.bench.problems import Problem, encoder_problem, operator_problem
from dcnv3_tvm.bench.report import CaseResult, Report, Row
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.spec import DCNv3Spec


def run(
    cases: Sequence[DCNv3Spec] | Sequence[EncoderCase],
    *,
    against: Sequence[Peer] = (),
    threads: int,
    plan: Plan | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure this library and its peers.

    Parameters
    ----------
    cases : sequence of DCNv3Spec or of EncoderCase
        What is computed.
    against : sequence of Peer
        Whom to compare with; those not installed are skipped.
    threads : int
        Threads of every contestant. The operator as users call it takes its number from the
        environment variable ``TVM_NUM_THREADS``, to be set before.
    plan : Plan, optional
        How often to call.
    on_step : callable
        Called with what happens next.

    Returns
    -------
    Report
        In a case where an output is wrong nothing is timed.
    """
    plan = plan or Plan()
    provenance = Provenance.here(threads)
    skipped = absent(against)
    for name, reason in skipped.items():
        on_step(f"without {name}, {reason} (pip install 'dcnv3-tvm[bench]')")
    on_step("measure the machine")
    peaks = measure_peaks(threads)
    results = []
    for case in cases:
        on_step(f"{case.slug}: inputs and reference")
        problem = operator_problem(case) if isinstance(case, DCNv3Spec) else encoder_problem(case)
        present = [peer for peer in against if peer.name not in skipped]
        results.append(_run_case(problem, present, threads, plan, peaks, on_step))
    return Report(
        kind="encoder" if any(isinstance(case, EncoderCase) for case in cases) else "op",
        provenance=provenance,
        plan=plan,
        peaks=peaks,
        cases=tuple(results),
        skipped=skipped,
    )


def _run_case(
    problem: Problem,
    peers: Sequence[Peer],
    threads: int,
    plan: Plan,
    peaks: Peaks,
    on_step: Callable[[str], None],
) -> CaseResult:
    on_step(f"{problem.slug}: build {OURS}")
    contestants = ours.build(problem, threads)
    failures: list[Row] = []
    for peer in peers:
        on_step(f"{problem.slug}: build {peer.name}")
        try:
            contestants.append(peer.build(problem, threads))
        except Exception as error:
            # A peer that cannot be built is a result too, whatever its library raises.
            failures.append(Row(peer.name, failure=first_line(error)))
    floors = Floors.of(problem.flops, problem.traffic, peaks, problem.dtype)
    return compete(
        problem.slug,
        problem.reference,
        contestants,
        failures,
        floors,
        plan,
        on_step,
        measure_error=problem.measure,
    )


def compete(
    slug: str,
    reference: Sequence[Any],
    contestants: Sequence[Contestant],
    failures: Sequence[Row],
    floors: Floors,
    plan: Plan,
    on_step: Callable[[str], None] = lambda _: None,
    *,
    measure_error: str = MAX,
    error: Callable[[Sequence[Any], Sequence[Any], str], float] = error_of,
    forgiving: bool = False,
    **timing: Any,
) -> CaseResult:
    """Compare the contestants' outputs with the truth, and time them if all are right.

    Parameters
    ----------
    slug : str
        Name of the case.
    reference : sequence of numpy.ndarray
        The true outputs.
    contestants : sequence of Contestant
        This library's own call among them, to which the others are compared.
    failures : sequence of Row
        Peers that could not be built.
    floors : Floors
        Least times.
    plan : Plan
        How often to call.
    on_step : callable
        Called with what happens next.
    measure_error : str
        How errors are measured, see `error_of`.
    error : callable
        Computes them; `error_of` unless the outputs are no arrays of NumPy.
    forgiving : bool
        Time those that are right even where others, this library among them, are wrong or fail.
    **timing
        ``clock``, ``sleep``, ``before`` and ``seconds_of``, as of `measure`.
    """
    rows: dict[str, Row] = {}
    for contestant in contestants:
        on_step(f"{slug}: compare {contestant.name}")
        try:
            outputs = contestant.outputs(contestant.call())
        except Exception as failed:
            if contestant.name.startswith(OURS) and not forgiving:
                raise
            rows[contestant.name] = Row(contestant.name, failure=first_line(failed))
        else:
            truth = reference if contestant.reference is None else contestant.reference
            rows[contestant.name] = Row(
                contestant.name,
                error(outputs, truth, measure_error),
                contestant.tolerance,
                peak_bytes=contestant.peak_bytes,
            )
    running = [
        contestant
        for contestant in contestants
        if rows[contestant.name].failure is None and not rows[contestant.name].wrong
    ]
    if forgiving or not any(row.wrong for row in rows.values()):
        timings = measure(
            {contestant.name: contestant.call for contestant in running},
            plan,
            on_round=lambda number: on_step(f"{slug}: round {number + 1} of {plan.rounds}"),
            **timing,
        )
        for name, timing_found in timings.items():
            rows[name] = dataclasses.replace(
                rows[name],
                seconds=timing_found.seconds,
                ratio=timing_found.ratio_to(timings[OURS]) if OURS in timings else None,
                redone=timing_found.redone,
            )
    return CaseResult(slug, floors, (*rows.values(), *failures), measure_error)


def first_line(error: Exception) -> str:
    """Say in a line what went wrong in someone else's code."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text[:160]}"
