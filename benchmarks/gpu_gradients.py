"""Show what the assembler reports about the kernels of the operator and its gradients.

For the stages of a variant: registers, spills, occupancy and instructions of each kernel, and lower
bounds of its time: bytes at the memory bandwidth, and instructions at the issue rate. The
instructions of kernels without loops are those that a thread executes. Needs nvcc, no GPU:

    python benchmarks/gpu_gradients.py --variant internimage_t --batch 64 --dtype float16
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Final

from dcnv3_tvm import targets
from dcnv3_tvm.bench.cases import stage_specs
from dcnv3_tvm.bench.gpu_models import GPU_MODELS, gpu_model
from dcnv3_tvm.cli.result import table
from dcnv3_tvm.compiler.cuda.assembler_report import report
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules import schedule
from dcnv3_tvm.schedules.gpu.launch import block_threads, launches
from dcnv3_tvm.spec import DCNv3Spec

KINDS: Final = ("dcnv3", "dcnv3_grad_offset_mask", "dcnv3_grad_x")

ISSUE_RATE: Final = 132 * 4 * 32 * 1.755e9
"""Instructions of threads a second on an H100 or H200: SMs, schedulers, threads, clock."""


def kernel_bytes(spec: DCNv3Spec, kind: str) -> int:
    """Return the bytes of a kernel's arguments; the gradient of x is also set to zero."""
    x, out, offset, mask = (
        math.prod(int(size or 0) for size in shape) * DTYPE_BYTES[spec.dtype]
        for shape in (spec.input_shape, spec.output_shape, spec.offset_shape, spec.mask_shape)
    )
    if kind == "dcnv3":
        return x + out + offset + mask
    if kind == "dcnv3_grad_offset_mask":
        return x + out + 2 * (offset + mask)
    sums = x // DTYPE_BYTES[spec.dtype] * DTYPE_BYTES[spec.accumulate_dtype]
    return out + offset + mask + 3 * sums  # zeros written, sums read and written


def blocks(extents: dict[str, str]) -> int:
    """Return the number of thread blocks of a launch."""
    return math.prod(int(size) for axis, size in extents.items() if axis.startswith("blockIdx"))


def main() -> None:
    """Print one line for each stage and kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="internimage_t")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device-model", default="h200", choices=[*GPU_MODELS])
    arguments = parser.parse_args()
    model = gpu_model(arguments.device_model)
    target = targets.resolve_gpu(model.target)
    specs = [
        dataclasses.replace(spec, softmax=True, dtype=arguments.dtype)
        for spec in stage_specs(arguments.variant, batch=arguments.batch)
    ]
    cases = [(spec, kind) for spec in specs for kind in KINDS]
    scheduled = [
        schedule(getattr(tensorir, kind)(spec, vector_loads=True), target).function
        for spec, kind in cases
    ]
    lines = []
    for (spec, kind), function, (*_, kernel) in zip(
        cases, scheduled, report(scheduled, target), strict=True
    ):
        launch = launches(function)[-1]
        instructions = kernel.instructions * blocks(launch) * block_threads(launch)
        traffic = kernel_bytes(spec, kind)
        lines.append(
            [
                "x".join(str(size) for size in spec.input_shape[1:]),
                kind,
                kernel.registers,
                kernel.spill_bytes + kernel.stack_bytes,
                f"{kernel.occupancy:.2f}",
                kernel.instructions,
                f"{traffic / 1e6:.0f}",
                f"{1e6 * traffic / model.peaks.bytes:.0f}",
                f"{1e6 * instructions / ISSUE_RATE:.0f}",
            ]
        )
    header = ["stage", "kernel", "registers", "spilled", "occupancy", "instructions"]
    print(table([*header, "MB", "memory us", "issue us"], lines))


if __name__ == "__main__":
    main()
