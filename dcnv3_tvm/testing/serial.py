"""GPU schedules on the processor: the threads of a kernel one after the other.

Before it is lowered, a loop that is bound to threads means the same as a serial loop: what a block
reads was written by blocks before it. So a scheduled kernel, its thread loops made serial, gives on
the CPU what it would give on the GPU, and no GPU is needed to see whether a schedule is right. What
it does not show: the order of threads (races), and the tensor cores' instructions, which stand in
the kernel as plain loops until `dcnv3_tvm.schedules.gpu.tensor_core` replaces them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.imported import ImportedModel
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target


def serialized(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Make the thread loops of a scheduled kernel serial.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        What a rule for GPUs returned.

    Returns
    -------
    tvm.tirx.PrimFunc
        For LLVM targets. Annotations, which only guide the lowering for GPUs, are gone.
    """
    return func.with_body(_serial(func.body))


def _serial(node: Any) -> Any:
    if isinstance(node, tirx.SeqStmt):
        return tirx.SeqStmt([_serial(statement) for statement in node.seq])
    if isinstance(node, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(node.iter_values, node.predicate, _serial(node.block))
    if isinstance(node, s_tir.SBlock):
        return s_tir.SBlock(
            node.iter_vars,
            node.reads,
            node.writes,
            node.name_hint,
            _serial(node.body),
            None if node.init is None else _serial(node.init),
            node.alloc_buffers,
            node.match_buffers,
        )
    if isinstance(node, tirx.For):
        bound = node.kind == tirx.ForKind.THREAD_BINDING
        kind = tirx.ForKind.SERIAL if bound else node.kind
        return tirx.For(node.loop_var, node.min, node.extent, kind, _serial(node.body))
    if isinstance(node, tirx.IfThenElse):
        other = None if node.else_case is None else _serial(node.else_case)
        return tirx.IfThenElse(node.condition, _serial(node.then_case), other)
    return node


def run_serially(
    imported: ImportedModel, target: Target, inputs: Sequence[Any], *, dtype: str, entry: str
) -> list[Any]:
    """Run a model compiled for a GPU on the processor, every kernel by its GPU schedule.

    Parameters
    ----------
    imported : ImportedModel
        The model.
    target : tvm.target.Target
        A GPU.
    inputs : sequence of numpy.ndarray
        Inputs of the entry.
    dtype : str
        Element type of products, as for `dcnv3_tvm.compile_model`.
    entry : str
        ``"main"`` or ``"features"``.

    Returns
    -------
    list of numpy.ndarray
        The entry's outputs.
    """
    program, _ = pipeline.run_pipeline(imported, target, dtype=dtype, until="fuse")
    module, _ = schedule_module(program.module, target, intrinsics=False)
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(var, serialized(function))
    host = resolve_target("cpu")
    planned, _ = pipeline.plan_memory(dataclasses.replace(program, module=module), host)
    executable = relax.build(planned, host, relax_pipeline=pipeline.lower_passes())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = [program.weights[name] for name in program.entries[entry].weights]
    arguments = [tvm.runtime.tensor(array) for array in (*inputs, *weights)]
    result = machine[entry](*arguments)
    outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [output.numpy() for output in outputs]
