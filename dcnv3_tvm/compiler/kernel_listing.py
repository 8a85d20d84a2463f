"""List the kernels that a compiled model calls, with their arguments and number of calls."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import tvm
from tvm import relax, tirx
from tvm.target import Target

from dcnv3_tvm.compiler.pipeline import run_pipeline
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.schedules import ScheduledKernel


class KernelArgument(NamedTuple):
    """Shape and element type of a kernel's argument."""

    shape: tuple[int, ...]
    dtype: str


class CalledKernel(NamedTuple):
    """A kernel of a model and how it is called.

    Parameters
    ----------
    name : str
        Name in the module.
    rule : str
        Schedule rule that scheduled it; empty if it is not scheduled.
    function : tvm.tirx.PrimFunc
        The kernel.
    inputs, outputs : tuple of KernelArgument
        Its arguments.
    calls : int
        Calls in one call of the model.
    """

    name: str
    rule: str
    function: tirx.PrimFunc
    inputs: tuple[KernelArgument, ...]
    outputs: tuple[KernelArgument, ...]
    calls: int

    @property
    def kind(self) -> str:
        """Kind of kernel as its definition names it; for TVM's own kernels, the rule."""
        attributes = None if self.function is None else self.function.attrs
        return str((attributes or {}).get(KERNEL_ATTR, self.rule))

    @property
    def shapes(self) -> str:
        """Shapes of the inputs, an arrow, and shapes of the outputs."""
        inputs = ", ".join(map(_text, self.inputs))
        return f"{inputs} -> {', '.join(map(_text, self.outputs))}"


def model_kernels(
    imported: ImportedModel,
    target: Target,
    *,
    dtype: str = "float32",
    scheduled: bool = True,
    on_phase: Callable[[str], None] | None = None,
) -> list[CalledKernel]:
    """Run the pipeline on a model and list the kernels of its entry ``"main"``.

    Parameters
    ----------
    imported : ImportedModel
        Model with static shapes.
    target : tvm.target.Target
        Target to lower for.
    dtype : str
        As in `dcnv3_tvm.compiler.pipeline.run_pipeline`.
    scheduled : bool
        Whether to schedule the kernels.
    on_phase : callable, optional
        Called with the name of each phase before it runs.
    """
    until = "schedule" if scheduled else "fuse"
    program, rules = run_pipeline(imported, target, dtype=dtype, until=until, on_phase=on_phase)
    return called_kernels(program.module, rules)


def called_kernels(
    module: tvm.IRModule, schedules: Mapping[str, ScheduledKernel] = MappingProxyType({})
) -> list[CalledKernel]:
    """List the kernels that the entry ``"main"`` of a module calls.

    Parameters
    ----------
    module : tvm.IRModule
        Module with static shapes.
    schedules : dict of str to ScheduledKernel
        How each kernel was scheduled, by its name.
    """
    calls: collections.Counter[str] = collections.Counter()
    arguments: dict[str, tuple[tuple[KernelArgument, ...], tuple[KernelArgument, ...]]] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.call_tir":
                name = call.args[0].name_hint
                calls[name] += 1
                result = call.ty_args[0]
                outputs = result.fields if isinstance(result, relax.TupleType) else [result]
                arguments[name] = (
                    _arguments(field.ty for field in call.args[1].fields),
                    _arguments(outputs),
                )
    return [
        CalledKernel(
            name,
            schedules[name].rule if name in schedules else "",
            module[name],
            *arguments[name],
            count,
        )
        for name, count in calls.items()
    ]


def _arguments(types: Iterable[Any]) -> tuple[KernelArgument, ...]:
    return tuple(
        KernelArgument(tuple(int(size) for size in ty.shape), str(ty.dtype.dtype)) for ty in types
    )


def _text(argument: KernelArgument) -> str:
    dtype = "" if argument.dtype == "float32" else f" {argument.dtype}"
    return "x".join(map(str, argument.shape)) + dtype
