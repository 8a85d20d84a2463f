"""Tuning tasks: the kernels of models and operators that have more than one schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.compiler.compile import effective_dtype
from dcnv3_tvm.compiler.gradients import training_spec
from dcnv3_tvm.compiler.kernel_listing import KernelArgument, called_kernels
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.records import describe_kernel, workload_key
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import is_gpu

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel


@dataclasses.dataclass(frozen=True)
class TuningTask:
    """A kernel to tune.

    Parameters
    ----------
    workload : str
        `workload_key` of the kernel.
    kernel : str
        Readable description of the kernel.
    rule : str
        Name of the schedule rule that applies to it.
    function : tvm.tirx.PrimFunc
        Unscheduled kernel.
    arguments : tuple of KernelArgument
        Its inputs, followed by its outputs.
    outputs : int
        Number of its outputs.
    calls : int
        Number of calls in one run of everything that is tuned together.
    space : dict of str to tuple of Decision
        Search space: the candidates of each decision, the rule's default first.
    reference : tvm.tirx.PrimFunc
        Unscheduled kernel for CPUs that computes the same, with which results are compared.
    """

    workload: str
    kernel: str
    rule: str
    function: tirx.PrimFunc
    arguments: tuple[KernelArgument, ...]
    outputs: int
    calls: int
    space: Mapping[str, tuple[Decision, ...]]
    reference: tirx.PrimFunc

    @classmethod
    def of(
        cls,
        function: tirx.PrimFunc,
        arguments: tuple[KernelArgument, ...],
        calls: int,
        target: Target,
        *,
        outputs: int = 1,
        reference: tirx.PrimFunc | None = None,
    ) -> TuningTask:
        """Create the task of a kernel; the schedule rules give its search space.

        Without `reference`, the kernel itself runs on CPUs.
        """
        scheduled = schedules.schedule(function, target)
        return cls(
            workload=workload_key(function),
            kernel=describe_kernel(function),
            rule=scheduled.rule,
            function=function,
            arguments=arguments,
            outputs=outputs,
            calls=calls,
            space=scheduled.space,
            reference=function if reference is None else reference,
        )

    @property
    def size(self) -> int:
        """Number of schedules in the search space."""
        return math.prod(map(len, self.space.values()))

    @property
    def default(self) -> dict[str, Decision]:
        """Default decisions of the rule."""
        return {name: values[0] for name, values in self.space.items()}

    def allows(self, decisions: Mapping[str, Decision]) -> bool:
        """Whether decisions are in the search space."""
        return decisions.keys() == self.space.keys() and all(
            value in self.space[name] for name, value in decisions.items()
        )


class Candidate(NamedTuple):
    """One schedule of a kernel.

    Parameters
    ----------
    task : TuningTask
        The kernel.
    decisions : dict of str to Decision
        Decisions of its schedule rule.
    """

    task: TuningTask
    decisions: dict[str, Decision]


def list_tasks(
    models: Sequence[ImportedModel | DCNv3Spec],
    target: Target,
    dtype: str,
    *,
    backward: bool = False,
) -> list[TuningTask]:
    """List the tuning tasks of models and operators, each kernel once.

    Parameters
    ----------
    models : sequence of ImportedModel or DCNv3Spec
        Models and operators.
    target : tvm.target.Target
        Target to tune for.
    dtype : str
        Element type of matmul operands in models.
    backward : bool
        Whether to tune the gradient kernels of operators, too.

    Raises
    ------
    InvalidArgumentError
        If no kernel has more than one schedule.
    """
    dtype = effective_dtype(dtype, target)
    tasks: list[TuningTask] = []
    for model in models:
        if isinstance(model, DCNv3Spec):
            tasks.append(operator_task(model, target))
            if backward:
                tasks += gradient_tasks(model, target)
        else:
            tasks += model_tasks(model, target, dtype)
    merged = merge_tasks(tasks)
    if not merged:
        raise InvalidArgumentError(
            "there is nothing to tune", got=f"{len(tasks)} kernels with a single schedule each"
        )
    return merged


def model_tasks(
    imported: ImportedModel, target: Target, dtype: str = "float32"
) -> list[TuningTask]:
    """List the tuning tasks of a model: its kernels before scheduling.

    Parameters
    ----------
    imported : ImportedModel
        Model with static shapes.
    target : tvm.target.Target
        Target that the model is compiled for.
    dtype : str
        Element type of matmul operands.

    Raises
    ------
    InvalidArgumentError
        If an input has a dynamic shape.
    """
    dynamic_sizes = sorted(
        {
            str(size)
            for entry in imported.entries.values()
            for tensor in entry.inputs
            for size in tensor.shape
            if not isinstance(size, int)
        }
    )
    if dynamic_sizes:
        raise InvalidArgumentError(
            "kernels are tuned for static shapes",
            got=f"a model with dynamic sizes: {', '.join(dynamic_sizes)}",
            hint="Import the model without dynamic_batch and dynamic_size.",
        )
    program, _ = pipeline.run_pipeline(imported, target, dtype=dtype, until="fuse")
    return merge_tasks(
        TuningTask.of(
            kernel.function,
            (*kernel.inputs, *kernel.outputs),
            kernel.calls,
            target,
            outputs=len(kernel.outputs),
        )
        for kernel in called_kernels(program.module)
    )


def operator_task(spec: DCNv3Spec, target: Target) -> TuningTask:
    """Return the tuning task of the operator.

    Raises
    ------
    InvalidArgumentError
        If the shape is dynamic.
    """
    if not spec.is_static:
        raise InvalidArgumentError(
            "kernels are tuned for static shapes",
            got=spec.slug,
            hint="Give batch, height and width.",
        )
    kernel = tensorir.dcnv3(spec, vector_loads=is_gpu(target))
    return TuningTask.of(kernel, _operator_arguments(spec), 1, target)


def gradient_tasks(spec: DCNv3Spec, target: Target) -> list[TuningTask]:
    """Return the tuning tasks of the gradient kernels of an operator.

    The kernels have a dynamic batch and height, as those that training compiles, and are measured
    with the sizes of `spec`.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, static.
    target : tvm.target.Target
        Target to tune for.
    """
    compiled = training_spec(spec)
    x, offset, mask, out = _operator_arguments(spec)
    grad_x = KernelArgument(x.shape, spec.accumulate_dtype)
    return [
        TuningTask.of(
            kernel(compiled, vector_loads=is_gpu(target)),
            (*inputs, *outputs),
            1,
            target,
            outputs=len(outputs),
            reference=kernel(compiled),
        )
        for kernel, inputs, outputs in (
            (tensorir.dcnv3_grad_x, (out, offset, mask), (grad_x,)),
            (tensorir.dcnv3_grad_offset_mask, (x, offset, mask, out), (offset, mask)),
        )
    ]


def _operator_arguments(spec: DCNv3Spec) -> tuple[KernelArgument, ...]:
    """Return x, offset, mask and the result of a static problem."""
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    return tuple(KernelArgument(tuple(size or 0 for size in shape), spec.dtype) for shape in shapes)


def merge_tasks(tasks: Iterable[TuningTask]) -> list[TuningTask]:
    """Merge tasks of the same kernel, and drop kernels with a single schedule."""
    merged: dict[str, TuningTask] = {}
    for task in tasks:
        if task.size > 1:
            known = merged.get(task.workload)
            calls = task.calls + (known.calls if known is not None else 0)
            merged[task.workload] = dataclasses.replace(task, calls=calls)
    return list(merged.values())
