"""Single kernels: those that a model calls, and how one becomes a library."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import tvm
from tvm import relax, tirx
from tvm.target import Target

from dcnv3_tvm.compiler.cuda.export import export_module
from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.schedules import ScheduledKernel
from dcnv3_tvm.targets import is_gpu

ENTRY: Final = "main"
"""Name of a kernel in a library of its own, unless another is given."""


class Tensor(NamedTuple):
    """Shape and element type of an argument."""

    shape: tuple[int, ...]
    dtype: str


class Kernel(NamedTuple):
    """A kernel of a model: its function, and how it is called.

    Parameters
    ----------
    name : str
        In the module.
    rule : str
        The schedule rule that took it; empty where it is not scheduled yet.
    function : tvm.tirx.PrimFunc
        The kernel.
    inputs, outputs : tuple of Tensor
        Its arguments.
    calls : int
        In a call of the model.
    """

    name: str
    rule: str
    function: tirx.PrimFunc
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    calls: int

    @property
    def kind(self) -> str:
        """What it was built to compute; for kernels that are not ours, the rule that took them."""
        attributes = None if self.function is None else self.function.attrs
        return str((attributes or {}).get(KERNEL_ATTR, self.rule))

    @property
    def shapes(self) -> str:
        """Its arguments, the outputs behind an arrow."""
        inputs = ", ".join(map(_shown, self.inputs))
        return f"{inputs} -> {', '.join(map(_shown, self.outputs))}"


def called_kernels(
    module: tvm.IRModule, taken: Mapping[str, ScheduledKernel] = MappingProxyType({})
) -> list[Kernel]:
    """List the kernels that the entry ``"main"`` of a module calls.

    Parameters
    ----------
    module : tvm.IRModule
        With fixed shapes.
    taken : dict of str to ScheduledKernel
        How each kernel was scheduled, if they are.
    """
    calls: collections.Counter[str] = collections.Counter()
    found: dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.call_tir":
                name = call.args[0].name_hint
                calls[name] += 1
                result = call.ty_args[0]
                outputs = result.fields if isinstance(result, relax.TupleType) else [result]
                found[name] = (
                    _tensors(field.ty for field in call.args[1].fields),
                    _tensors(outputs),
                )
    return [
        Kernel(name, taken[name].rule if name in taken else "", module[name], *found[name], count)
        for name, count in calls.items()
    ]


def export_kernel(
    function: tirx.PrimFunc, target: Target, path: Path, *, name: str = ENTRY
) -> None:
    """Compile a kernel to a shared library.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Scheduled, for a GPU.
    target : tvm.target.Target
        What it is for.
    path : Path
        The library.
    name : str
        What the kernel is called in it.

    Raises
    ------
    RuntimeError
        If it cannot be compiled.
    """
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    if is_gpu(target):
        export_module(module, target, path)
    else:
        tvm.compile(module, target=target).export_library(str(path))


def _tensors(types: Iterable[Any]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(tuple(int(size) for size in found.shape), str(found.dtype.dtype)) for found in types
    )


def _shown(tensor: Tensor) -> str:
    kind = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    return "x".join(map(str, tensor.shape)) + kind
