"""``dcnv3(x, offset, mask, group=...)`` on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, TypeVar, cast

from dcnv3_tvm import gpu
from dcnv3_tvm.compiler.argument_checks import check_shapes, check_tensors
from dcnv3_tvm.compiler.operator import compile_op, result_tensor
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.repeated_call import RepeatedCall, RepeatedCalls
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
    """Compute DCNv3, forward only.

    A kernel is compiled for each new combination of shape, parameters and dtype, which takes about
    0.2 s on a CPU and 1 s for a GPU, and kept in memory and on disk. `dcnv3_tvm.compile_op`
    compiles one kernel for many sizes. The result carries no gradient.

    Parameters
    ----------
    x : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
        Shape (N, H, W, C), channels-last; float64, float32, float16 or bfloat16 (in NumPy by
        ml_dtypes). Tensors on an NVIDIA GPU are processed there, on the current stream.
    offset : same kind, dtype and device
        Shape (N, Ho, Wo, group*P*2): for every point x before y, in pixels before `offset_scale`.
    mask : same kind, dtype and device
        Shape (N, Ho, Wo, group*P): one factor for each point; logits with `softmax`.
    group, kernel_size, stride, pad, dilation, offset_scale, remove_center, softmax
        As for `dcnv3_tvm.spec.DCNv3Params`; P is its number of points.
    out : same kind, dtype and device, optional
        Shape of the result, which is written to it. Contiguous and writable, and it shares no
        memory with the inputs.

    Returns
    -------
    Same kind as `x`
        Shape (N, Ho, Wo, C), contiguous, dtype of `x`; float16 and bfloat16 are computed in
        float32 and rounded once. It is `out`, if that is given.

    Raises
    ------
    InvalidArgumentError
        If a tensor has the wrong kind, rank, dtype, shape or device, or a parameter is out of
        range.

    Notes
    -----
    The kernel works on the memory of the tensors. Only a tensor that is not contiguous, not
    writable or not in native byte order is copied.

    Examples
    --------
    >>> import numpy as np
    >>> x, offset = np.ones((1, 4, 5, 6), "float32"), np.zeros((1, 4, 5, 2 * 9 * 2), "float32")
    >>> y = dcnv3(x, offset, np.full((1, 4, 5, 2 * 9), 1 / 9, "float32"), group=2)
    >>> y.shape, round(float(y[0, 1, 1, 0]), 5), round(float(y[0, 0, 0, 0]), 5)
    ((1, 4, 5, 6), 1.0, 0.44444)
    """
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
    operator = compile_op(spec, target_of(device))
    result = operator.run_checked(spec, x, offset, mask, out)
    if call is None or call.kernel is not operator.kernel:
        _CALLS.keep(RepeatedCall(spec, operator.kernel), x, key)
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
