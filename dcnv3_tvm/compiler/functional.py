"""``dcnv3(x, offset, mask, group=...)`` on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

from dcnv3_tvm import gpu
from dcnv3_tvm.compiler.argument_checks import check_shapes, check_tensors
from dcnv3_tvm.compiler.operator import compile_op
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.spec import DCNv3Spec

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

    Returns
    -------
    Same kind as `x`
        Shape (N, Ho, Wo, C), contiguous, dtype of `x`; float16 and bfloat16 are computed in
        float32 and rounded once.

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
    device = check_tensors(x, offset, mask)
    shape = tensors.shape_of(x)
    if 0 in shape[1:]:
        raise InvalidArgumentError("x is empty", got=f"shape {shape}", allowed="sizes of 1 or more")
    dtype = tensors.dtype_of(x)
    if dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            "x has a dtype that is not supported", got=dtype, allowed=", ".join(DTYPE_BYTES)
        )
    spec = cached_spec(
        shape,
        dtype=dtype,
        group=_hashable(group),
        kernel_size=_hashable(kernel_size),
        stride=_hashable(stride),
        pad=_hashable(pad),
        dilation=_hashable(dilation),
        offset_scale=_hashable(offset_scale),
        remove_center=_hashable(remove_center),
        softmax=_hashable(softmax),
    )
    check_shapes(spec, x, offset, mask)
    if spec.batch == 0:
        return tensors.empty_like(x, [int(size or 0) for size in spec.output_shape])
    return compile_op(spec, target_of(device)).run_checked(spec, x, offset, mask)


# Constructing a specification takes longer than computing a small problem.
cached_spec = functools.lru_cache(maxsize=256, typed=True)(DCNv3Spec.of)


@functools.lru_cache(maxsize=64)
def target_of(device: str) -> str:
    """Return the target for tensors on a device; a GPU's names its own architecture."""
    if device == tensors.CPU:
        return "auto"
    return gpu.target_name(gpu.device(int(device.partition(":")[2])).arch)


def _hashable(value: Any) -> Hashable:
    """Return a parameter as a cache key; an invalid one as its text, which is rejected."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        return tuple(map(_hashable, plain))
    return plain if isinstance(plain, Hashable) else repr(plain)
