"""Compile a single kernel to a shared library."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import tvm
from tvm import tirx
from tvm.target import Target

from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.compiler.cuda.export import export_module
from dcnv3_tvm.compiler.linker import find_linker, system_to_build
from dcnv3_tvm.targets import is_gpu

ENTRY: Final = "main"
"""Name of the kernel in its library."""


def export_kernel(function: tirx.PrimFunc, target: Target, path: Path) -> None:
    """Compile a kernel to a shared library.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        The kernel; scheduled if the target is a GPU.
    target : tvm.target.Target
        Target to compile for.
    path : Path
        Library to write.

    Raises
    ------
    RuntimeError
        If compilation fails.
    MissingDependencyError, TargetError
        If there is no linker for the target.
    """
    module = tvm.IRModule({ENTRY: function.with_attr("global_symbol", ENTRY)})
    if is_gpu(target):
        export_module(module, target, path)
    else:
        executable = tvm.compile(module, target=target, tir_pipeline=cpu_pipeline.PIPELINE)
        executable.export_library(str(path), fcompile=find_linker(system_to_build(target)))
