"""A complete GPU benchmark within a time budget, which writes every report when it is complete."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from dcnv3_tvm import files, machine
from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.bench.budget import JobBudget, TimeBudget
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.extensions import EXTENSIONS
from dcnv3_tvm.bench.gpu_cases import SECONDS, OperatorGroup, compile_jobs
from dcnv3_tvm.bench.gpu_compilation import CompilePool
from dcnv3_tvm.bench.gpu_context import GpuContext
from dcnv3_tvm.bench.gpu_encoder import PLAN as ENCODER_PLAN
from dcnv3_tvm.bench.gpu_encoder import measure_encoder
from dcnv3_tvm.bench.gpu_gradient import measure_gradients
from dcnv3_tvm.bench.gpu_operator import PLAN as OPERATOR_PLAN
from dcnv3_tvm.bench.gpu_operator import measure_operator
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import SCHEMA, BackendRow, CaseResult, Report, failure_text
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.bench.torch_gpu import TorchGpu
from dcnv3_tvm.provenance import Provenance

_OPERATOR_SHARE: Final = 0.45
_COMPILE_SHARES: Final = {"op": 0.12, "encoder": 0.35}
_COMPILE_SECONDS: Final = {"op": 10.0, "encoder": 60.0}
_CASE_SECONDS: Final = {"op": 3.0, "encoder": 15.0}
_MEASURING_CORES: Final = 2


@dataclasses.dataclass(frozen=True)
class GpuRun:
    """Results of a GPU benchmark.

    Parameters
    ----------
    provenance : Provenance
        Machine, GPU, versions and date.
    reports : dict of str to Report
        Reports by file name.
    skipped : dict of str to str
        Cases and backends that were not measured, and why.
    seconds : float
        Duration of the run.
    """

    provenance: Provenance
    reports: dict[str, Report]
    skipped: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all outputs of this library were correct."""
        rows = (
            row for report in self.reports.values() for case in report.cases for row in case.rows
        )
        return not any(row.name.startswith(OURS) and (row.wrong or row.failure) for row in rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {
            "schema": SCHEMA,
            "kind": "gpu",
            "provenance": self.provenance.to_json(),
            "seconds": self.seconds,
            "reports": {name: report.to_json() for name, report in self.reports.items()},
            "skipped": self.skipped,
        }


class GpuBenchmark:
    """A run on a GPU.

    Parameters
    ----------
    gpu : TorchGpu
        The GPU.
    pool : CompilePool
        Compiles this library's kernels and encoders.
    results : Path
        Folder for one JSON file per report.
    budget : TimeBudget
        Time for the run.
    on_step : callable
        Called with a description of each step before it runs.
    """

    def __init__(
        self,
        gpu: TorchGpu,
        pool: CompilePool,
        results: Path,
        budget: TimeBudget,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._gpu = gpu
        self._pool = pool
        self._results = results
        self._budget = budget
        self._on_step = on_step
        self._provenance = gpu_provenance(gpu)
        self._reports: dict[str, Report] = {}
        self._skipped = {
            extension.name: extension.import_failure
            for extension in EXTENSIONS
            if extension.import_failure is not None
        }
        self._broken: str | None = None

    def run(self, groups: Sequence[OperatorGroup], cases: Sequence[EncoderCase]) -> GpuRun:
        """Measure operators, then encoders, until the time is used up.

        Parameters
        ----------
        groups : sequence of OperatorGroup
            Operators, with one report per group.
        cases : sequence of EncoderCase
            Encoders, with one report each.
        """
        for name, reason in self._skipped.items():
            self._on_step(f"skip {name}, {reason}")
        self._pool.submit(compile_jobs(groups, cases))
        self._on_step("measure the peak rates of the GPU")
        peaks = self._gpu.peaks()
        operators = self._budget.part(_OPERATOR_SHARE if cases else 1.0)
        context = self._context("op", operators, peaks)
        for group in groups:
            results = list(self._operators(group, operators, context))
            self._keep("op", group.slug, results, OPERATOR_PLAN, peaks)
        context = self._context("encoder", self._budget, peaks)
        for case in cases:
            measure = functools.partial(measure_encoder, case, context)
            result = self._case("encoder", case.slug, self._budget, measure)
            self._keep("encoder", case.slug, [result] if result else [], ENCODER_PLAN, peaks)
        run = GpuRun(self._provenance, self._reports, self._skipped, self._budget.spent)
        self._write(
            result_name(self._gpu, "run", ""), run.to_json() | {"reports": list(self._reports)}
        )
        return run

    def _context(self, part: str, budget: TimeBudget, peaks: Peaks) -> GpuContext:
        seconds = _COMPILE_SHARES[part] * self._budget.seconds
        torch_compile = JobBudget(seconds, _COMPILE_SECONDS[part], budget)
        return GpuContext(self._gpu, self._pool, torch_compile, peaks, self._on_step)

    def _operators(
        self, group: OperatorGroup, budget: TimeBudget, context: GpuContext
    ) -> Iterator[CaseResult]:
        for spec in group.specs:
            measure = measure_gradients if group.backward else measure_operator
            slug = f"{spec.slug}-backward" if group.backward else spec.slug
            result = self._case("op", slug, budget, functools.partial(measure, spec, context))
            if result is not None:
                yield result

    def _case(
        self, part: str, slug: str, budget: TimeBudget, measure: Callable[[float], CaseResult]
    ) -> CaseResult | None:
        """Measure a case, unless no time is left or the GPU has failed before."""
        if self._broken is not None:
            self._skipped[slug] = f"the GPU had failed: {self._broken}"
            return None
        if budget.left < _CASE_SECONDS[part]:
            self._skipped[slug] = "no time left"
            return None
        try:
            result = measure(budget.left - _CASE_SECONDS[part])
        except Exception as error:  # PyTorch raises many types, usually for lack of memory
            failed = BackendRow(OURS, failure=failure_text(error))
            result = CaseResult(slug, Roofline(0.0, 0.0), (failed,))
        try:
            self._gpu.release()
        except RuntimeError as error:
            self._broken = f"{slug}: {failure_text(error)}"
        return result

    def _keep(
        self, kind: str, slug: str, results: list[CaseResult], plan: Plan, peaks: Peaks
    ) -> None:
        """Write a report at once, because a later case may end the process."""
        if not results:
            return
        name = result_name(self._gpu, kind, slug)
        skipped = dict(self._skipped)
        report = Report(kind, self._provenance, plan, peaks, tuple(results), skipped)
        self._reports[name] = report
        self._write(name, report.to_json())

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._results.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(self._results / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def gpu_provenance(gpu: TorchGpu) -> Provenance:
    """Describe this process and a GPU."""
    from dcnv3_tvm.runtime.library import default_threads

    here = Provenance.here(default_threads(), gpu=gpu.name, driver=gpu.driver)
    cuda = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    return dataclasses.replace(here, versions=here.versions | cuda)


def result_name(gpu: TorchGpu, kind: str, slug: str) -> str:
    """Return the name of a result file, for example ``"cuda-h200-op-paper-f16-torch2.11"``."""
    version = ".".join(torch.__version__.split(".")[:2])
    return "-".join(filter(None, ["cuda", gpu.slug, kind, slug, f"torch{version}"]))


def run_gpu(
    groups: Sequence[OperatorGroup],
    cases: Sequence[EncoderCase],
    *,
    results: Path,
    artifacts: Path | None = None,
    seconds: float = SECONDS,
    index: int = 0,
    on_step: Callable[[str], None] = lambda _: None,
) -> GpuRun:
    """Benchmark operators and encoders on a GPU of this machine.

    Parameters
    ----------
    groups : sequence of OperatorGroup
        Operators.
    cases : sequence of EncoderCase
        Encoders.
    results : Path
        Folder for the JSON files.
    artifacts : Path, optional
        Folder of compiled kernels and encoders: existing ones are used, others are compiled into
        it. A temporary folder by default.
    seconds : float
        Time budget; cases that do not fit are skipped.
    index : int
        Index of the GPU.
    on_step : callable
        Called with a description of each step before it runs.

    Raises
    ------
    TargetError
        If there is no such GPU.
    MissingDependencyError
        If PyTorch cannot use it.
    """
    budget = TimeBudget(seconds)
    gpu = TorchGpu(index)
    workers = max(1, machine.physical_cores() - _MEASURING_CORES)
    with (
        tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-", ignore_cleanup_errors=True) as own,
        CompilePool(artifacts or Path(own), gpu.target, workers) as pool,
    ):
        return GpuBenchmark(gpu, pool, results, budget, on_step).run(groups, cases)
