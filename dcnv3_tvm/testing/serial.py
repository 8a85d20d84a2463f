"""GPU schedules on the processor: the threads of a kernel one after the other.

Before it is lowered, a loop that is bound to threads means the same as a serial loop: what a block
reads was written by blocks before it. So a scheduled kernel, its thread loops made serial, gives on
the CPU what it would give on the GPU, and no GPU is needed to see whether a schedule is right. What
it does not show: the order of threads (races), and the tensor cores' instructions, which stand in
the kernel as plain loops until `dcnv3_tvm.schedules.gpu.tensor_core` replaces them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.target import Target
from tvm.tirx.analysis import undefined_vars

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

    Raises
    ------
    ValueError
        If what is done by all threads of an axis depends on a loop around it that is bound to the
        same axis. On a GPU the two are one: each thread does its share of its own part alone.
    """
    return func.with_body(_serial(func.body, {}))


def _serial(node: Any, axes: Mapping[str, tirx.Var]) -> Any:
    if isinstance(node, tirx.SeqStmt):
        return tirx.SeqStmt([_serial(statement, axes) for statement in node.seq])
    if isinstance(node, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(node.iter_values, node.predicate, _serial(node.block, axes))
    if isinstance(node, s_tir.SBlock):
        return s_tir.SBlock(
            node.iter_vars,
            node.reads,
            node.writes,
            node.name_hint,
            _serial(node.body, axes),
            None if node.init is None else _serial(node.init, axes),
            node.alloc_buffers,
            node.match_buffers,
        )
    if isinstance(node, tirx.For):
        bound = node.kind == tirx.ForKind.THREAD_BINDING
        kind = tirx.ForKind.SERIAL if bound else node.kind
        if bound:
            axis = str(node.thread_binding.thread_tag)
            outer = axes.get(axis)
            free = undefined_vars(node.body, [node.loop_var])
            if outer is not None and any(var.same_as(outer) for var in free):
                raise ValueError(f"loops inside each other are bound to {axis}: {outer} is used")
            axes = {**axes, axis: node.loop_var}
        return tirx.For(node.loop_var, node.min, node.extent, kind, _serial(node.body, axes))
    if isinstance(node, tirx.IfThenElse):
        other = None if node.else_case is None else _serial(node.else_case, axes)
        return tirx.IfThenElse(node.condition, _serial(node.then_case, axes), other)
    return node


def run_serially(
    imported: ImportedModel,
    target: Target,
    inputs: Sequence[Any],
    *,
    dtype: str,
    host: str = "cpu",
) -> dict[str, list[Any]]:
    """Run a model compiled for a GPU on the processor, every kernel by its GPU schedule.

    Parameters
    ----------
    imported : ImportedModel
        The model.
    target : tvm.target.Target
        A GPU.
    inputs : sequence of numpy.ndarray
        Of every entry.
    dtype : str
        Element type of products, as for `dcnv3_tvm.compile_model`.
    host : str
        What runs it.

    Returns
    -------
    dict of str to list of numpy.ndarray
        The outputs of each entry.
    """
    program, _ = pipeline.run_pipeline(imported, target, dtype=dtype, until="fuse")
    module, _ = schedule_module(program.module, target, intrinsics=False)
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(var, serialized(function))
    processor = resolve_target(host)
    planned, _ = pipeline.plan_memory(dataclasses.replace(program, module=module), processor)
    executable = relax.build(planned, processor, relax_pipeline=pipeline.lower_passes())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = {}
    for name, entry in program.entries.items():
        weights = [program.weights[weight] for weight in entry.weights]
        result = machine[name](*(tvm.runtime.tensor(array) for array in (*inputs, *weights)))
        outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        found[name] = [output.numpy() for output in outputs]
    return found
