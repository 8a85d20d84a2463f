"""Compile modules quickly, for tests that do not check CPU code."""

import tempfile
from pathlib import Path

import tvm
from tvm import relax


def compile_library(module: tvm.IRModule) -> tvm.runtime.Module:
    """Compile with TVM's default pipeline for the CPU, without LLVM's optimisations.

    A shared library instead of TVM's JIT, which always optimises and takes four times as long.
    """
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "module.so"
        tvm.compile(module, target).export_library(str(library))
        return tvm.runtime.load_module(str(library))


def compile_relax(module: tvm.IRModule) -> relax.VirtualMachine:
    """Compile as `compile_library` does."""
    return relax.VirtualMachine(compile_library(module), tvm.cpu())
