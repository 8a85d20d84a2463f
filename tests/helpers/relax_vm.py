"""Compile Relax with TVM's default pipeline, for tests of the importer."""

import tvm
from tvm import relax


def compile_relax(module: tvm.IRModule) -> relax.VirtualMachine:
    """Compile for the CPU without LLVM's optimisations: short programs that run once."""
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    return relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())
