"""``dcnv3(x, offset, mask, group=...)`` on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, TypeVar, cast

from dcnv3_tvm import gpu
from dcnv3_tvm.compiler.argument_checks import check_shapes, check_tensors
from dcnv3_tvm.compiler.compile_kernel import DCNV3
from dcnv3_tvm.compiler.kernel_spec import kernel_spec
from dcnv3_tvm.compiler.operator import compile_op, result_tensor
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.repeated_call import RepeatedCalls
from dcnv3_tvm.spec import PARAMETERS, DCNv3Keywords, DCNv3Spec

TensorT = TypeVar("TensorT")


def dcnv3(
    x: TensorT,
    offset: TensorT,
    mask: TensorT,
    *,
    group: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    pad: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    out: TensorT | None = None,
) -> TensorT:
    """Compute DCNv3 without gradients; arguments are those of `dcnv3_tvm.dcnv3`."""
    parameters = (
        group,
        kernel_size,
        stride,
        pad,
        dilation,
        offset_scale,
        remove_center,
        softmax,
    )
    key = parameters if tuple(map(type, parameters)) == _USUAL_TYPES else _key(parameters)
    call = _CALLS.find(x, key)
    repeated = None if call is None else call.run(x, offset, mask, out)
    if repeated is not None:
        return cast("TensorT", repeated)
    device = check_tensors(x, offset, mask)
    shape = tensors.shape_of(x)
    if 0 in shape[1:]:
        raise InvalidArgumentError("x is empty", got=f"shape {shape}", allowed="sizes of 1 or more")
    dtype = tensors.dtype_of(x)
    if dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            "x has a dtype that is not supported", got=dtype, allowed=", ".join(DTYPE_BYTES)
        )
    spec = call.spec if call else DCNv3Spec.of(shape, dtype=dtype, **_keywords(parameters))
    check_shapes(spec, x, offset, mask)
    if spec.batch == 0:
        return result_tensor(spec, x, offset, mask, out)
    operator = compile_op(kernel_spec(DCNV3, spec), target_of(device))
    result = operator.run_checked(spec, x, offset, mask, out)
    if call is None or call.kernel is not operator.kernel:
        _CALLS.keep(spec, operator.kernel, x, key)
    return result


_CALLS: Final = RepeatedCalls()
_USUAL_TYPES: Final = (int, int, int, int, int, float, bool, bool)


def _key(parameters: Sequence[Any]) -> tuple[Any, ...]:
    """Return a key that differs for 3, 3.0 and True, which are equal but not all valid."""
    values = (_key(each) if isinstance(each, list | tuple) else each for each in parameters)
    return tuple(map(type, parameters)), *values


def _keywords(parameters: Sequence[Any]) -> DCNv3Keywords:
    return cast("DCNv3Keywords", dict(zip(PARAMETERS, parameters, strict=True)))


@functools.lru_cache(maxsize=64)
def target_of(device: str) -> str:
    """Return the target for tensors on a device; a GPU's names its own architecture."""
    if device == tensors.CPU:
        return "auto"
    return gpu.target_name(gpu.device(int(device.partition(":")[2])).arch)
