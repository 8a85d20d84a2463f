"""One DCNv3 problem, compiled and callable."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dcnv3_tvm import machine, targets
from dcnv3_tvm.errors import (
    CompileError,
    InvalidArgumentError,
    MissingDependencyError,
    TargetError,
)
from dcnv3_tvm.op import functional, tensors
from dcnv3_tvm.runtime import library
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from tvm.target import Target

TensorT = TypeVar("TensorT")

CACHE_SIZE: Final = 256
"""Compiled operators kept; the least recently used goes first."""

_COMPILING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class CompiledOperator:
    """A compiled DCNv3 operator: call it with ``(x, offset, mask)``.

    Parameters
    ----------
    spec : DCNv3Spec
        What was compiled; sizes that are ``None`` may differ from call to call.
    target : tvm.target.Target
        What it was compiled for.
    rule : str
        Name of the schedule rule that was used.
    executable : tvm.runtime.Executable
        The compiled module, with one function, ``dcnv3(x, offset, mask, out)``.
    """

    spec: DCNv3Spec
    target: Target
    rule: str
    executable: Any

    def __call__(self, x: TensorT, offset: TensorT, mask: TensorT) -> TensorT:
        """Run the operator.

        Parameters
        ----------
        x, offset, mask : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
            As for `dcnv3_tvm.dcnv3`, with the shapes of `spec`.

        Returns
        -------
        Same kind as `x`
            Shape (N, Ho, Wo, C).

        Raises
        ------
        InvalidArgumentError
            If a tensor does not fit `spec`.
        TargetError
            If the operator was compiled for another machine.
        """
        tensors.kind_of({"x": x, "offset": offset, "mask": mask})
        shape = tensors.shape_of(x)
        fits = len(shape) == 4 and all(
            size == wanted or (wanted is None and size > 0)
            for size, wanted in zip(shape, self.spec.input_shape, strict=True)
        )
        if not fits:
            raise InvalidArgumentError(
                "x has the wrong shape",
                got=f"shape {shape}",
                allowed=f"shape {self.spec.input_shape} (None: any size), NHWC",
            )
        spec = self.spec
        if not spec.is_static:
            spec = dataclasses.replace(spec, batch=shape[0], height=shape[1], width=shape[2])
        functional.check_arguments(spec, x, offset, mask)
        return self.call_checked(spec, x, offset, mask)

    def call_checked(self, spec: DCNv3Spec, x: TensorT, offset: TensorT, mask: TensorT) -> TensorT:
        """Run the operator on tensors already checked against the static problem `spec`."""
        kind = tensors.kind_of({"x": x})
        library.use_threads(_threads())
        out: TensorT = tensors.empty(kind, [int(s or 0) for s in spec.output_shape], spec.dtype)
        self._function(*(tensors.to_kernel(kind, tensor) for tensor in (x, offset, mask, out)))
        return out

    @functools.cached_property
    def _function(self) -> Any:
        """The kernel, loaded; on another machine than it was compiled for, an error."""
        architecture = str(self.target.attrs.get("mtriple", "")).partition("-")[0]
        if architecture not in ("", machine.architecture()):
            lacking = [architecture]
        else:
            lacking = machine.missing_features(targets.target_features(self.target))
        if lacking:
            raise TargetError(
                "the operator was compiled for another machine",
                got=f"{targets.target_slug(self.target)}, which needs {', '.join(lacking)}",
                hint='Compile with target="auto".',
            )
        return self.executable["dcnv3"]


@functools.cache
def _threads() -> int:
    return library.default_threads()


def compile_op(
    spec: DCNv3Spec, target: str | Mapping[str, Any] | Target = "auto"
) -> CompiledOperator:
    """Compile the operator for one problem.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. Sizes that are ``None`` stay open: one operator for all of them.
    target : str, mapping or tvm.target.Target
        As for `dcnv3_tvm.targets.resolve_target`.

    Returns
    -------
    CompiledOperator
        From a cache of the last `CACHE_SIZE` problems, if it was compiled before.

    Raises
    ------
    TargetError
        If the target is unknown.
    CompileError
        If TVM fails to compile it.
    MissingDependencyError
        If TVM's compiler is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnv3_tvm import DCNv3Spec
    >>> operator = compile_op(DCNv3Spec.of((None, None, None, 8), group=2))
    >>> x, offset = np.ones((1, 6, 7, 8), "float32"), np.zeros((1, 6, 7, 36), "float32")
    >>> operator(x, offset, np.ones((1, 6, 7, 18), "float32")).shape
    (1, 6, 7, 8)
    """
    # Targets compare by identity: their text is the key.
    name = "auto" if isinstance(target, str) and target == "auto" else None
    try:
        return _compile(spec, name or str(targets.resolve_target(target)))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tvm":
            raise
        raise MissingDependencyError(
            "TVM's compiler, which the operator needs, is not installed",
            hint="Run: pip install apache-tvm==0.27.0.post1",
        ) from error


@functools.lru_cache(maxsize=CACHE_SIZE)
def _compile(spec: DCNv3Spec, target_text: str) -> CompiledOperator:
    import tvm
    from tvm.ir import IRModule
    from tvm.target import Target

    from dcnv3_tvm.op.tensorir import dcnv3
    from dcnv3_tvm.schedules import schedule_module

    auto = target_text == "auto"
    target = targets.resolve_target("auto") if auto else Target(target_text)
    with _COMPILING:
        module, rules = schedule_module(IRModule({"dcnv3": dcnv3(spec)}), target)
        try:
            executable = tvm.compile(module, target=target)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CompileError(
                f"TVM cannot compile the operator ({error})",
                got=f"{spec.slug} for {targets.target_slug(target)}",
            ) from error
        return CompiledOperator(spec, target, rules["dcnv3"], executable)
