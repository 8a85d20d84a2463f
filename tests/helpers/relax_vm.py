"""Compile Relax modules quickly, for tests of the importer."""

import tempfile
from pathlib import Path

import tvm
from tvm import relax


def compile_relax(module: tvm.IRModule) -> relax.VirtualMachine:
    """Compile with TVM's default pipeline for the CPU, without LLVM's optimisations.

    A shared library instead of TVM's JIT, which always optimises and takes four times as long.
    """
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "module.so"
        tvm.compile(module, target).export_library(str(library))
        return relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
