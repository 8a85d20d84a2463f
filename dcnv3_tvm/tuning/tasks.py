"""What is tuned: kernels whose schedules leave something to decide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.compiler.kernel_listing import Tensor, called_kernels
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.records import describe_kernel, workload_key
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel


@dataclasses.dataclass(frozen=True)
class Task:
    """A kernel to tune.

    Parameters
    ----------
    workload : str
        `workload_key` of the kernel.
    kernel : str
        The kernel for people.
    rule : str
        The schedule rule that takes it.
    function : tvm.tirx.PrimFunc
        Unscheduled.
    arguments : tuple of Tensor
        Its inputs, and behind them its output.
    calls : int
        In one call of all that is tuned together.
    space : dict of str to tuple of Decision
        The decisions of the rule, and what each may be, its default first.
    """

    workload: str
    kernel: str
    rule: str
    function: tirx.PrimFunc
    arguments: tuple[Tensor, ...]
    calls: int
    space: Mapping[str, tuple[Decision, ...]]

    @classmethod
    def of(
        cls, function: tirx.PrimFunc, arguments: tuple[Tensor, ...], calls: int, target: Target
    ) -> Task:
        """Ask the schedule rules what they decide for a kernel."""
        scheduled = schedules.schedule(function, target)
        return cls(
            workload=workload_key(function),
            kernel=describe_kernel(function),
            rule=scheduled.rule,
            function=function,
            arguments=arguments,
            calls=calls,
            space=scheduled.space,
        )

    @property
    def size(self) -> int:
        """Number of schedules among which to choose."""
        return math.prod(map(len, self.space.values()))

    @property
    def default(self) -> dict[str, Decision]:
        """What the rule decides by itself."""
        return {name: values[0] for name, values in self.space.items()}

    def allows(self, decisions: Mapping[str, Decision]) -> bool:
        """Whether these are decisions of the space."""
        return decisions.keys() == self.space.keys() and all(
            value in self.space[name] for name, value in decisions.items()
        )


def model_tasks(imported: ImportedModel, target: Target, dtype: str = "float32") -> list[Task]:
    """List the kernels of a model, as the compiler will meet them.

    Parameters
    ----------
    imported : ImportedModel
        With fixed shapes.
    target : tvm.target.Target
        What it is compiled for.
    dtype : str
        Element type of the products.

    Raises
    ------
    InvalidArgumentError
        If a size is known only at run time.
    """
    open_sizes = sorted(
        {
            str(size)
            for entry in imported.entries.values()
            for tensor in entry.inputs
            for size in tensor.shape
            if not isinstance(size, int)
        }
    )
    if open_sizes:
        raise InvalidArgumentError(
            "kernels are tuned for fixed sizes",
            got=f"a model with sizes known only at run time: {', '.join(open_sizes)}",
            hint="Import it without dynamic_batch and dynamic_size.",
        )
    program, _ = pipeline.run_pipeline(imported, target, dtype=dtype, until="fuse")
    found = [
        Task.of(kernel.function, (*kernel.inputs, *kernel.outputs), kernel.calls, target)
        for kernel in called_kernels(program.module)
    ]
    return merged(found)


def operator_task(spec: DCNv3Spec, target: Target) -> Task:
    """Return the kernel of the operator for one problem.

    Raises
    ------
    InvalidArgumentError
        If a size is left open.
    """
    if not spec.is_static:
        raise InvalidArgumentError("kernels are tuned for fixed sizes", got=spec.slug)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    arguments = tuple(Tensor(tuple(size or 0 for size in shape), spec.dtype) for shape in shapes)
    return Task.of(tensorir.dcnv3(spec), arguments, 1, target)


def merged(tasks: Iterable[Task]) -> list[Task]:
    """Join tasks for the same kernel, and leave out those with nothing to decide."""
    found: dict[str, Task] = {}
    for task in tasks:
        if task.size > 1:
            known = found.get(task.workload)
            calls = task.calls + (known.calls if known is not None else 0)
            found[task.workload] = dataclasses.replace(task, calls=calls)
    return list(found.values())
