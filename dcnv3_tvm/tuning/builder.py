"""Build a candidate schedule into a shared library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import schedules, targets
from dcnv3_tvm.compiler.kernel_library import export_kernel
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.space import Decision


def build_candidate(
    function: tirx.PrimFunc, target: Target, decisions: Mapping[str, Decision], path: Path
) -> None:
    """Schedule a kernel with the given decisions and compile it to a shared library.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Unscheduled kernel.
    target : tvm.target.Target
        Target to compile for.
    decisions : mapping of str to Decision
        Decisions of the schedule rule that applies to the kernel.
    path : Path
        Output file.

    Raises
    ------
    CompileError, RuntimeError
        If the decisions are not valid for the kernel, or it cannot be compiled.
    """
    scheduled = schedules.schedule(function, target, decisions).function
    if targets.is_gpu(target):
        scheduled = tensorize(scheduled)
    export_kernel(scheduled, target, path)
