"""Export compiled GPU kernels as a shared library that holds cubins instead of CUDA source.

An artifact is then the same whether or not the machine it was built on has a GPU, and nothing is
compiled when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm

from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.compiler.cuda.nvcc import compile_cubin
from dcnv3_tvm.compiler.linker import Linker, find_linker
from dcnv3_tvm.systems import this_system
from dcnv3_tvm.tvm_workarounds.device_code import pack_imports


def export_module(
    module: tvm.IRModule, target: tvm.target.Target, path: Path, *, linker: Linker | None = None
) -> None:
    """Compile scheduled kernels, and Relax functions that call them, to a shared library.

    Parameters
    ----------
    module : tvm.IRModule
        Tensorized.
    target : tvm.target.Target
        A GPU.
    path : Path
        The library to write.
    linker : Linker, optional
        Links object files to a library; by default what `find_linker` finds.

    Raises
    ------
    CompileError
        If there is no CUDA compiler, or it reports an error.
    RuntimeError
        If TVM cannot compile the module.
    """
    with device_pipeline.lowering():
        executable = tvm.compile(module, target=target, tir_pipeline=device_pipeline.PIPELINE)
    export_executable(executable.mod, path, str(target.attrs["arch"]), linker=linker)


def export_executable(module: Any, path: Path, arch: str, *, linker: Linker | None = None) -> None:
    """Write a module that was built under `device_pipeline.lowering` to a shared library.

    Parameters
    ----------
    module : tvm.runtime.Module
        The ``mod`` of an executable.
    path : Path
        The library to write.
    arch : str
        GPU architecture, for example ``"sm_90"``.
    linker : Linker, optional
        As for `export_module`.

    Raises
    ------
    CompileError
        If there is no CUDA compiler, or it reports an error.
    """

    def pack(root: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        sources = device_pipeline.cuda_sources(root)
        blob = pack_imports(root, {source: compile_cubin(source, arch) for source in sources})
        generate = tvm.get_global_func("codegen.codegen_blob")
        host = tvm.target.Target({"kind": "llvm"})
        file = Path(folder) / "devices.o"
        generate(blob, is_system_lib, str(host), prefix).write_to_file(str(file))
        return str(file)

    linker = linker or find_linker(this_system())
    module.export_library(str(path), fcompile=linker, fpack_imports=pack)
