"""Compile modules quickly, for tests that do not check CPU code."""

import tempfile
from pathlib import Path

import tvm
from tvm import relax

from dcnv3_tvm.schedules import ScheduledKernel, schedule_module
from dcnv3_tvm.targets import resolve_target

_LLVM = {"kind": "llvm"}


def compile_library(module: tvm.IRModule, target: dict = _LLVM) -> tvm.runtime.Module:
    """Compile with TVM's default pipeline for the CPU, without LLVM's optimisations.

    A shared library instead of TVM's JIT, which always optimises and takes four times as long.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "module.so"
        plain = tvm.target.Target({**target, "opt-level": 0})
        tvm.compile(module, plain).export_library(str(library))
        return tvm.runtime.load_module(str(library))


def compile_relax(module: tvm.IRModule) -> relax.VirtualMachine:
    """Compile as `compile_library` does."""
    return relax.VirtualMachine(compile_library(module), tvm.cpu())


def compile_scheduled(
    module: tvm.IRModule,
) -> tuple[relax.VirtualMachine, dict[str, ScheduledKernel]]:
    """Lower, fuse and schedule a module for this machine; compile it as `compile_library` does."""
    target = resolve_target("auto")
    fuse = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    module, kernels = schedule_module(tvm.transform.Sequential(fuse)(module), target)
    library = compile_library(module, dict(target.export()))
    return relax.VirtualMachine(library, tvm.cpu()), kernels
