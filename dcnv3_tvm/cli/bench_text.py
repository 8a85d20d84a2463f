"""Reports of ``dcnv3-tvm bench`` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcnv3_tvm.bench.contestants import NORM
from dcnv3_tvm.cli.result import table

if TYPE_CHECKING:
    from dcnv3_tvm.bench.floors import Peaks
    from dcnv3_tvm.bench.gpu_report import Compilation, GpuRun
    from dcnv3_tvm.bench.listing import Listing
    from dcnv3_tvm.bench.report import CaseResult, Report


def report_text(report: Report | Listing[Any] | GpuRun | Compilation) -> str:
    """Show a report to people: the machine, the floors, a table a case."""
    from dcnv3_tvm.bench.gpu_report import Compilation, GpuRun
    from dcnv3_tvm.bench.listing import Listing

    if isinstance(report, Compilation):
        lines = [f"{len(report.compiled)} compiled for {report.target}"]
        return "\n".join(lines + [f"failed: {name}: {why}" for name, why in report.failed.items()])
    if isinstance(report, GpuRun):
        sections = [f"{name}\n\n{report_text(one)}" for name, one in report.reports.items()]
        sections.append("\n".join(f"skipped {name}: {why}" for name, why in report.skipped.items()))
        return "\n\n".join(filter(None, [*sections, f"{report.seconds:.0f} s in all"]))
    if isinstance(report, Listing):
        listed = f"{report.slug}\n{table(report.HEADER, report.cells())}"
        sections = [report.provenance.line, report.how, listed, "\n".join(report.summary())]
        return "\n\n".join(filter(None, sections))
    sections = [report.provenance.line, _rates(report.peaks), *map(_case_text, report.cases)]
    sections += [f"skipped {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n\n".join(sections)


def _case_text(case: CaseResult) -> str:
    from dcnv3_tvm.bench.report import TABLE_HEADER, table_rows

    lines = [case.slug, table(TABLE_HEADER, table_rows(case))]
    if case.measure == NORM:
        lines.append(
            "Errors are ‖error‖ / ‖reference‖; the arithmetic floor is of 16-bit products."
        )
    memory = [(row.name, row.peak_bytes) for row in case.rows if row.peak_bytes is not None]
    if memory:
        shown = ", ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in memory)
        lines.append(f"Memory: {shown}.")
    if case.wrong:
        lines.append(
            f"No times: the outputs of {', '.join(case.wrong)} are not those of the float64 "
            "reference."
        )
    return "\n".join(lines)


def _rates(peaks: Peaks) -> str:
    half = f" ({peaks.half_flops / 1e9:.0f} for 16-bit products)" if peaks.half_flops else ""
    rates = f"{peaks.flops / 1e9:.0f} GFLOP/s{half} and {peaks.bytes / 1e9:.1f} GB/s"
    return f"floors from {rates}, {peaks.how}"
