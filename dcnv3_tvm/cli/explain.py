"""``dcnv3-tvm explain``: which schedule takes each kernel of a model, and what came out."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Final

from dcnv3_tvm.cli.compile import parse_size
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import InvalidArgumentError

HELP: Final = "say which schedule takes each kernel of a model, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="a name of `dcnv3-tvm models`")
    parser.add_argument("--target", default="auto", help="as for compile (default: this processor)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the products (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the image (default: the model's own)"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="compile each kernel for the GPU and show registers, memory and instructions "
        "(needs nvcc, no GPU)",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Ask the rules about every kernel."""
    from dcnv3_tvm import schedules, targets
    from dcnv3_tvm.bench.variant_kernels import variant_kernels
    from dcnv3_tvm.compiler.compile import check_dtype
    from dcnv3_tvm.compiler.cuda.assembler_report import report
    from dcnv3_tvm.schedules.explain import explain, launch
    from dcnv3_tvm.schedules.gpu.tensorize import tensorize

    target = targets.resolve_target(arguments.target)
    on_gpu = targets.is_gpu(target)
    if arguments.report and not on_gpu:
        raise InvalidArgumentError(
            "a report is made of kernels for a GPU",
            got=f"--target {targets.target_slug(target)}",
            allowed="--target cuda-sm90 and the like",
        )
    check_dtype(arguments.dtype, target)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for kernel in variant_kernels(
        arguments.model,
        target,
        arguments.dtype,
        batch=arguments.batch,
        size=arguments.size,
    ):
        verdicts, scheduled = explain(kernel.function, target)
        row: dict[str, Any] = {"kernel": kernel.name, "rule": schedules.UNSCHEDULED}
        for verdict in verdicts:
            if verdict.taken:
                row["rule"] = verdict.rule
                reasons[verdict.rule] = verdict.reason
        row["verdicts"] = [dataclasses.asdict(verdict) for verdict in verdicts]
        if on_gpu and scheduled is not None:
            row["launch"] = launch(scheduled)
            if arguments.report:
                row["report"] = [
                    dataclasses.asdict(part) for part in report(tensorize(scheduled), target)
                ]
        rows.append(row)
    return Result(rows, _text(rows, reasons))


def _text(rows: list[dict[str, Any]], reasons: dict[str, str]) -> str:
    header = ["kernel", "rule"]
    if "launch" in rows[0]:
        header.append("launch")
    if "report" in rows[0]:
        header += ["registers", "spilled", "shared", "occupancy", "instructions", "loads", "tensor"]
    lines = [[row[name] for name in header[:3] if name in row] + _measured(row) for row in rows]
    why = [f"{rule}: {reason}" for rule, reason in reasons.items()]
    return "\n".join([table(header, lines), "", *why])


def _measured(row: dict[str, Any]) -> list[Any]:
    if "report" not in row:
        return []
    part = row["report"][0]
    return [
        part["registers"],
        part["spill_bytes"] + part["stack_bytes"],
        part["shared_bytes"],
        f"{part['occupancy']:.2f}",
        part["instructions"],
        "/".join(map(str, part["load_bytes"])),
        "yes" if part["tensor_cores"] else "",
    ]
