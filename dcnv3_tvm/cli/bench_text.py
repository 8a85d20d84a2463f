"""Text reports of ``dcnv3-tvm bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcnv3_tvm.cli.result import table

if TYPE_CHECKING:
    from dcnv3_tvm.bench.gpu import GpuRun
    from dcnv3_tvm.bench.gpu_compilation import CompiledJobs
    from dcnv3_tvm.bench.report import CaseResult, Listing, Report
    from dcnv3_tvm.bench.roofline import Peaks


def report_text(report: Report | Listing[Any] | GpuRun | CompiledJobs) -> str:
    """Format a report: machine, peak rates, and one table per case."""
    from dcnv3_tvm.bench.gpu import GpuRun
    from dcnv3_tvm.bench.gpu_compilation import CompiledJobs
    from dcnv3_tvm.bench.report import Listing

    if isinstance(report, CompiledJobs):
        lines = [f"{len(report.compiled)} compiled for {report.target}"]
        return "\n".join(lines + [f"failed: {name}: {why}" for name, why in report.failed.items()])
    if isinstance(report, GpuRun):
        sections = [f"{name}\n\n{report_text(one)}" for name, one in report.reports.items()]
        sections.append("\n".join(f"skipped {name}: {why}" for name, why in report.skipped.items()))
        return "\n\n".join(filter(None, [*sections, f"{report.seconds:.0f} s in total"]))
    if isinstance(report, Listing):
        listed = f"{report.slug}\n{table(report.HEADER, report.cells())}"
        sections = [report.provenance.line, report.how, listed, "\n".join(report.summary())]
        return "\n\n".join(filter(None, sections))
    sections = [report.provenance.line, _rates(report.peaks), *map(_case_text, report.cases)]
    sections += [f"skipped {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n\n".join(sections)


def _case_text(case: CaseResult) -> str:
    from dcnv3_tvm.bench.report import TABLE_HEADER, table_rows
    from dcnv3_tvm.verify.tolerances import NORM_ERROR

    lines = [case.slug, table(TABLE_HEADER, table_rows(case))]
    if case.measure == NORM_ERROR:
        lines.append(
            "Errors are relative L2 errors; in 16-bit dtypes the roofline is that of matmuls."
        )
    memory = [(row.name, row.peak_bytes) for row in case.rows if row.peak_bytes is not None]
    if memory:
        shown = ", ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in memory)
        lines.append(f"Peak memory: {shown}.")
    if case.wrong:
        lines.append(f"Not timed: wrong outputs of {', '.join(case.wrong)}.")
    return "\n".join(lines)


def _rates(peaks: Peaks) -> str:
    half = f" ({peaks.half_flops / 1e9:.0f} in 16-bit matmuls)" if peaks.half_flops else ""
    rates = f"{peaks.flops / 1e9:.0f} GFLOP/s{half} and {peaks.bytes / 1e9:.1f} GB/s"
    return f"roofline of {rates}, {peaks.how}"
