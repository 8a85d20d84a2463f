"""Everything that is measured on a GPU, in one run that ends in time and writes what it found."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from dcnv3_tvm import files, machine, targets
from dcnv3_tvm.bench.budget import Allowance, Budget
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.bench.device import Device
from dcnv3_tvm.bench.extensions import EXTENSIONS
from dcnv3_tvm.bench.floors import Floors, Peaks
from dcnv3_tvm.bench.gpu_build import Builds
from dcnv3_tvm.bench.gpu_cases import SECONDS, OperatorGroup, jobs
from dcnv3_tvm.bench.gpu_contest import Setting
from dcnv3_tvm.bench.gpu_encoder import PLAN as ENCODER_PLAN
from dcnv3_tvm.bench.gpu_encoder import measure_encoder
from dcnv3_tvm.bench.gpu_operator import PLAN as OPERATOR_PLAN
from dcnv3_tvm.bench.gpu_operator import measure_operator
from dcnv3_tvm.bench.gpu_report import Compilation, GpuRun
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import CaseResult, Report, Row
from dcnv3_tvm.bench.runner import first_line
from dcnv3_tvm.provenance import Provenance

_OPERATOR_SHARE: Final = 0.45
_COMPILE_SHARES: Final = {"op": 0.12, "encoder": 0.35}
_COMPILE_SECONDS: Final = {"op": 10.0, "encoder": 60.0}
_CASE_SECONDS: Final = {"op": 3.0, "encoder": 15.0}
_MEASURING_CORES: Final = 2


class GpuBenchmark:
    """A run on a GPU.

    Parameters
    ----------
    device : Device
        To measure on.
    builds : Builds
        What compiles this library's kernels.
    results : Path
        Folder for a JSON and a CSV file a report, written as soon as it is complete.
    budget : Budget
        Time for all.
    on_step : callable
        Called with what happens next.
    """

    def __init__(
        self,
        device: Device,
        builds: Builds,
        results: Path,
        budget: Budget,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._device = device
        self._builds = builds
        self._results = results
        self._budget = budget
        self._on_step = on_step
        self._provenance = provenance_of(device)
        self._reports: dict[str, Report] = {}
        self._skipped = {
            extension.name: extension.absence
            for extension in EXTENSIONS
            if extension.absence is not None
        }
        self._broken: str | None = None

    def run(self, groups: Sequence[OperatorGroup], cases: Sequence[EncoderCase]) -> GpuRun:
        """Measure operators, then encoders, as far as the time goes.

        Parameters
        ----------
        groups : sequence of OperatorGroup
            Operators; a report each.
        cases : sequence of EncoderCase
            Encoders; a report each.
        """
        for name, reason in self._skipped.items():
            self._on_step(f"without {name}, {reason}")
        self._builds.submit(jobs(groups, cases))
        self._on_step("measure the GPU")
        peaks = self._device.peaks()
        share = _OPERATOR_SHARE if cases else 1.0
        operators = Budget(share * self._budget.left)
        setting = self._setting(self._compiling("op", operators), peaks)
        for group in groups:
            results = list(self._operators(group, operators, setting))
            self._keep("op", group.slug, results, OPERATOR_PLAN, peaks)
        setting = self._setting(self._compiling("encoder", self._budget), peaks)
        for case in cases:
            measure = functools.partial(measure_encoder, case, setting)
            result = self._case("encoder", case.slug, self._budget, measure)
            self._keep("encoder", case.slug, [result] if result else [], ENCODER_PLAN, peaks)
        run = GpuRun(self._provenance, self._reports, self._skipped, self._budget.spent)
        summary = run.to_json() | {"reports": list(self._reports)}
        self._write(result_name(self._device, "run", ""), {"json": summary})
        return run

    def _compiling(self, part: str, budget: Budget) -> Allowance:
        seconds = _COMPILE_SHARES[part] * self._budget.seconds
        return Allowance(seconds, _COMPILE_SECONDS[part], budget)

    def _operators(
        self, group: OperatorGroup, budget: Budget, setting: Setting
    ) -> Iterator[CaseResult]:
        for spec in group.specs:
            measure = functools.partial(measure_operator, spec, setting)
            result = self._case("op", spec.slug, budget, measure)
            if result is not None:
                yield result

    def _setting(self, compiling: Allowance, peaks: Peaks) -> Setting:
        return Setting(self._device, self._builds, compiling, peaks, self._on_step)

    def _case(
        self, part: str, slug: str, budget: Budget, measure: Callable[[float], CaseResult]
    ) -> CaseResult | None:
        """Measure a case, unless there is no time for it or the GPU has failed before."""
        if self._broken is not None:
            self._skipped[slug] = f"the GPU had failed: {self._broken}"
            return None
        if budget.left < _CASE_SECONDS[part]:
            self._skipped[slug] = "no time left"
            return None
        try:
            result = measure(budget.left - _CASE_SECONDS[part])
        except Exception as error:
            # What PyTorch raises, for want of memory as a rule, must not end the run.
            result = CaseResult(slug, Floors(0.0, 0.0), (Row(OURS, failure=first_line(error)),))
        try:
            self._device.release()
        except RuntimeError as error:
            self._broken = f"{slug}: {first_line(error)}"
        return result

    def _keep(
        self, kind: str, slug: str, results: list[CaseResult], plan: Plan, peaks: Peaks
    ) -> None:
        """Write what has been measured, at once: what comes next may end the process."""
        if not results:
            return
        name = result_name(self._device, kind, slug)
        skipped = dict(self._skipped)
        report = Report(kind, self._provenance, plan, peaks, tuple(results), skipped)
        self._reports[name] = report
        self._write(name, {"json": report.to_json(), "csv": report.to_csv()})

    def _write(self, name: str, contents: dict[str, Any]) -> None:
        self._results.mkdir(parents=True, exist_ok=True)
        for ending, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            with files.atomic_file(self._results / f"{name}.{ending}") as temporary:
                temporary.write_text(text, encoding="utf-8")


def provenance_of(device: Device) -> Provenance:
    """Describe this process and the GPU."""
    from dcnv3_tvm.runtime.library import default_threads

    here = Provenance.here(default_threads(), gpu=device.name, driver=device.driver)
    cuda = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    return dataclasses.replace(here, versions=here.versions | cuda)


def result_name(device: Device, kind: str, slug: str) -> str:
    """Name a result's files, for example ``"cuda-h200-op-paper-f16-torch2.11"``."""
    version = ".".join(torch.__version__.split(".")[:2])
    return "-".join(filter(None, ["cuda", device.slug, kind, slug, f"torch{version}"]))


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
    """Measure on a GPU of this machine.

    Parameters
    ----------
    groups : sequence of OperatorGroup
        Operators.
    cases : sequence of EncoderCase
        Encoders.
    results : Path
        Folder for the files.
    artifacts : Path, optional
        Folder of compiled kernels and encoders: what is there is used, and what is compiled stays
        there. A temporary one by default.
    seconds : float
        For all of it; what does not fit is left out.
    index : int
        Number of the GPU.
    on_step : callable
        Called with what happens next.

    Raises
    ------
    TargetError
        If there is no such GPU.
    MissingDependencyError
        If PyTorch cannot use it.
    """
    budget = Budget(seconds)
    device = Device(index)
    workers = max(1, machine.physical_cores() - _MEASURING_CORES)
    with (
        tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-", ignore_cleanup_errors=True) as own,
        Builds(artifacts or Path(own), device.target, workers) as builds,
    ):
        return GpuBenchmark(device, builds, results, budget, on_step).run(groups, cases)


def compile_ahead(
    groups: Sequence[OperatorGroup],
    cases: Sequence[EncoderCase],
    *,
    artifacts: Path,
    target: str,
    on_step: Callable[[str], None] = lambda _: None,
) -> Compilation:
    """Compile what `run_gpu` finds in a folder of artifacts, on a machine with or without a GPU.

    Parameters
    ----------
    groups, cases, artifacts, on_step
        As of `run_gpu`.
    target : str
        The GPU, for example ``"cuda-sm90"``.

    Raises
    ------
    TargetError
        If it is no GPU that kernels are compiled for.
    """
    targets.resolve_gpu(target)
    compiled, failed = [], {}
    todo = jobs(groups, cases)
    with Builds(artifacts, target, machine.physical_cores()) as builds:
        builds.submit(todo)
        for number, job in enumerate(todo):
            on_step(f"{number + 1} of {len(todo)}: {job.slug}")
            try:
                builds.result(job)
            except Exception as error:
                failed[job.slug] = first_line(error)
            else:
                compiled.append(job.slug)
    return Compilation(target, tuple(compiled), failed)
