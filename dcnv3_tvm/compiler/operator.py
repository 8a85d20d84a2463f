"""Compile the DCNv3 operator for one problem."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dcnv3_tvm import checks, targets
from dcnv3_tvm.compiler.argument_checks import check_out, check_shapes, check_tensors
from dcnv3_tvm.compiler.compile_kernel import CACHE_SIZE, DCNV3, compile_kernel
from dcnv3_tvm.errors import InvalidArgumentError, raise_if_tvm_is_missing
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.kernel import Kernel
from dcnv3_tvm.runtime.repeated_call import RepeatedCalls
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from tvm.target import Target

TensorT = TypeVar("TensorT")


@dataclasses.dataclass(frozen=True)
class CompiledOperator:
    """A compiled DCNv3 operator: call it with ``(x, offset, mask)``.

    Parameters
    ----------
    spec : DCNv3Spec
        What was compiled; sizes that are ``None`` may differ from call to call.
    kernel : Kernel
        The compiled kernel: how it was scheduled, for which target, and its code.
    database : str
        As passed to `compile_op`, which compiles again what was pickled or copied.
    """

    spec: DCNv3Spec
    kernel: Kernel
    database: str = "none"

    def __reduce__(self) -> tuple[Any, ...]:
        return _operator, (self.spec, self.kernel.target.text, self.database)

    def __call__(
        self, x: TensorT, offset: TensorT, mask: TensorT, *, out: TensorT | None = None
    ) -> TensorT:
        """Run the operator.

        Parameters
        ----------
        x, offset, mask, out : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
            As for `dcnv3_tvm.dcnv3`, with the shapes of `spec`, on the target's device.

        Returns
        -------
        Same kind as `x`
            Shape (N, Ho, Wo, C); `out`, if that is given.

        Raises
        ------
        InvalidArgumentError
            If a tensor does not match `spec`, or is on another device.
        TargetError
            If the operator was compiled for another machine.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        call = self._calls.find(x)
        repeated = None if call is None else call.run(x, offset, mask, out)
        if repeated is not None:
            return cast("TensorT", repeated)
        self.kernel.check_device(check_tensors(x, offset, mask))
        shape = tensors.shape_of(x)
        matches = len(shape) == 4 and all(
            size == wanted or (wanted is None and (size > 0 or axis == 0))
            for axis, (size, wanted) in enumerate(zip(shape, self.spec.input_shape, strict=True))
        )
        if not matches:
            raise InvalidArgumentError(
                "x has the wrong shape",
                got=f"shape {shape}",
                allowed=f"shape {self.spec.input_shape} (None: any size), NHWC",
            )
        spec = self.spec
        if not spec.is_static:
            spec = dataclasses.replace(spec, batch=shape[0], height=shape[1], width=shape[2])
        check_shapes(spec, x, offset, mask)
        if spec.batch == 0:
            return result_tensor(spec, x, offset, mask, out)
        result = self.run_checked(spec, x, offset, mask, out)
        if call is None:
            self._calls.keep(spec, self.kernel, x)
        return result

    @functools.cached_property
    def _calls(self) -> RepeatedCalls:
        return RepeatedCalls()

    def run_checked(
        self, spec: DCNv3Spec, x: TensorT, offset: TensorT, mask: TensorT, out: TensorT | None
    ) -> TensorT:
        """Run the operator on inputs already checked against the static specification `spec`.

        Its batch is not empty.
        """
        out = result_tensor(spec, x, offset, mask, out, self.kernel.alignment)
        self.kernel.run(tensors.device_of(x), (x, offset, mask, out))
        return out


def result_tensor(
    spec: DCNv3Spec,
    x: TensorT,
    offset: TensorT,
    mask: TensorT,
    out: TensorT | None,
    alignment: int = 1,
) -> TensorT:
    """Return the tensor for the result: `out`, after checking it, or a new one.

    Parameters
    ----------
    spec : DCNv3Spec
        A static specification, which the inputs match.
    x, offset, mask, out
        As the caller passed them.
    alignment : int
        Bytes of which the address is a multiple.
    """
    if out is None:
        return tensors.empty_like(x, cast("tuple[int, ...]", spec.output_shape))
    check_out(spec, out, (x, offset, mask), alignment)
    return out


def compile_op(
    spec: DCNv3Spec,
    target: str | Mapping[str, Any] | Target = "auto",
    *,
    database: str | os.PathLike[str] = "default",
) -> CompiledOperator:
    """Compile the operator for one problem.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. Sizes that are ``None`` are dynamic: one operator handles all of them. An empty
        batch is dynamic, too.
    target : str, mapping or tvm.target.Target
        As for `dcnv3_tvm.targets.resolve_target`.
    database : str or path
        Tuning records: ``"default"``, this package's own; ``"none"``; or a folder that
        `dcnv3-tvm tune` wrote.

    Returns
    -------
    CompiledOperator
        From a cache in memory or on disk, if it was compiled before; TVM is not imported then.

    Raises
    ------
    InvalidArgumentError
        If `spec` is not a specification.
    TargetError
        If the target is unknown.
    RecordsError
        If the folder `database` holds no records, or records for another target or TVM version.
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
    if not isinstance(spec, DCNv3Spec):
        raise InvalidArgumentError(
            "spec is not a DCNv3Spec",
            got=repr(spec),
            hint="For example compile_op(DCNv3Spec.of((1, 56, 56, 64), group=4)).",
        )
    if spec.batch == 0:
        spec = dataclasses.replace(spec, batch=None)
    try:
        # Targets compare by identity, so the cache is keyed by their text.
        text = _text_of(target) if isinstance(target, str) else targets.target_text(target)
        return _operator(spec, text, str(checks.path("database", database)))
    except ModuleNotFoundError as error:
        raise_if_tvm_is_missing(error, "the operator")
        raise


_text_of = functools.lru_cache(maxsize=64)(targets.target_text)


@functools.lru_cache(maxsize=CACHE_SIZE)
def _operator(spec: DCNv3Spec, target: str, database: str) -> CompiledOperator:
    return CompiledOperator(spec, compile_kernel(DCNV3, spec, target, database), database)
