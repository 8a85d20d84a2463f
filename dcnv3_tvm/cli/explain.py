"""``dcnv3-tvm explain``: which schedule rule each kernel of a model gets, and why."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Final

from dcnv3_tvm.cli.arguments import add_shape, image_shape
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress

HELP: Final = "show which schedule rule each kernel of a model gets, and why"
EXAMPLE: Final = "dcnv3-tvm explain internimage_t --target cpu-znver4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="a name listed by `dcnv3-tvm models`")
    parser.add_argument("--target", default="auto", help="as for compile (default: this CPU)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="element type of the matmuls (default: %(default)s)",
    )
    add_shape(parser)
    parser.add_argument(
        "--report",
        action="store_true",
        help="compile each kernel for the GPU and show registers, memory and instructions "
        "(needs nvcc, no GPU)",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Explain the schedule of each kernel of a model."""
    from dcnv3_tvm import frontend, schedules, targets
    from dcnv3_tvm.bench.cases import encoder_case
    from dcnv3_tvm.compiler.compile import effective_dtype
    from dcnv3_tvm.compiler.cuda.assembler_report import report
    from dcnv3_tvm.compiler.explain import launch, verdicts
    from dcnv3_tvm.compiler.kernel_listing import model_kernels
    from dcnv3_tvm.frontend.models.variants import model_config
    from dcnv3_tvm.schedules.gpu.tensorize import tensorize
    from dcnv3_tvm.verify.placeholder_weights import placeholder_model

    target = targets.resolve_target(arguments.target)
    on_gpu = targets.is_gpu(target)
    if arguments.report and not on_gpu:
        raise InvalidArgumentError(
            "--report needs a GPU target",
            got=f"--target {targets.target_slug(target)}",
            allowed="--target cuda-sm90 and the like",
        )
    dtype = effective_dtype(arguments.dtype, target)
    image_shape(arguments, model_config(arguments.model).resolution)  # Raises if it is too large.
    case = encoder_case(arguments.model, batch=arguments.batch, size=arguments.size)
    rows: list[dict[str, Any]] = []
    scheduled = []
    with Progress(f"explain {arguments.model}", quiet=arguments.quiet) as progress:
        progress.step("import")
        imported = frontend.import_model(
            placeholder_model(case.variant, shorten=True),
            example=(case.batch, 3, *case.size),
            features="never",
        )
        progress.step("schedule")
        for kernel in model_kernels(imported, target, dtype=dtype, scheduled=False):
            found = schedules.apply_rules(kernel.function, target)
            row: dict[str, Any] = {
                "kernel": kernel.name,
                "rule": found.rule,
                "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts(found, target)],
            }
            if on_gpu:
                row["launch"] = launch(found.function)
            rows.append(row)
            scheduled.append(found.function)
        if arguments.report:
            progress.step("compile for the GPU")
            reports = report([tensorize(function) for function in scheduled], target)
            for row, parts in zip(rows, reports, strict=True):
                row["report"] = [dataclasses.asdict(part) for part in parts]
    return Result(rows, _text(rows))


def _text(rows: list[dict[str, Any]]) -> str:
    header = ["kernel", "rule"]
    if "launch" in rows[0]:
        header.append("launch")
    if "report" in rows[0]:
        header += ["registers", "spilled", "shared", "occupancy", "instructions", "loads", "tensor"]
    lines = [[row[name] for name in header[:3] if name in row] + _measured(row) for row in rows]
    return "\n".join([table(header, lines), *_reasons(rows)])


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the rules tried say, once for all kernels to which they say the same."""
    kernels: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        said = []
        for verdict in row["verdicts"]:
            mark = "*" if verdict["taken"] else " "
            said.append(f"  {mark} {verdict['rule']}: {verdict['reason']}")
            if verdict["taken"]:
                break
        kernels.setdefault(tuple(said), []).append(row["kernel"])
    return [line for said, names in kernels.items() for line in ("", ", ".join(names), *said)]


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
