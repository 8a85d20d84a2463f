"""``dcnv3(x, offset, mask, group=...)`` on arrays of NumPy, PyTorch and TVM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import TypeVar

from dcnv3_tvm import gpu
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import dlpack
from dcnv3_tvm.spec import DCNv3Spec

TensorT = TypeVar("TensorT")

_NHWC_HINT = "NHWC is expected: an NCHW tensor needs x.permute(0, 2, 3, 1).contiguous()."


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
    """Sample a feature map with deformable points: DCNv3, forward only.

    A kernel is compiled for each new combination of shape, parameters and dtype (a tenth of a
    second or so, one for a GPU) and kept for the next call; see `dcnv3_tvm.compile_op` for one
    kernel that takes many sizes. The result carries no gradient.

    Parameters
    ----------
    x : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
        Shape (N, H, W, C), channels-last; float64, float32, float16 or bfloat16 (in NumPy through
        ml_dtypes). Tensors on an NVIDIA GPU are computed there, on the stream that is current.
    offset : same kind, dtype and place
        Shape (N, Ho, Wo, group*P*2): for every point x before y, in pixels before `offset_scale`.
    mask : same kind, dtype and place
        Shape (N, Ho, Wo, group*P): one factor a point; logits with `softmax`.
    group : int
        Number of groups; divides C.
    kernel_size, stride, pad, dilation : int or (int, int)
        (height, width), as in a convolution. P is the number of kernel points.
    offset_scale : float
        Factor on the regular grid and on the offsets alike.
    remove_center : bool
        Leave the central point out (odd kernels).
    softmax : bool
        Apply the softmax over the P points of a group to the mask.

    Returns
    -------
    Same kind as `x`
        Shape (N, Ho, Wo, C), contiguous, dtype of `x`; float16 and bfloat16 are computed in
        float32 and rounded once.

    Raises
    ------
    InvalidArgumentError
        If a tensor has the wrong kind, rank, dtype, shape or place, or a parameter is out of range.

    Notes
    -----
    Memory is shared with the kernel, not copied, unless a tensor is not contiguous, not writable
    or not in native byte order.

    Examples
    --------
    >>> import numpy as np
    >>> x, offset = np.ones((1, 4, 5, 6), "float32"), np.zeros((1, 4, 5, 2 * 9 * 2), "float32")
    >>> y = dcnv3(x, offset, np.full((1, 4, 5, 2 * 9), 1 / 9, "float32"), group=2)
    >>> y.shape, round(float(y[0, 1, 1, 0]), 5), round(float(y[0, 0, 0, 0]), 5)
    ((1, 4, 5, 6), 1.0, 0.44444)
    """
    # Imported here: importing the library must load neither TVM nor the compiler.
    from dcnv3_tvm.compiler.operator import compile_op

    dlpack.kind_of({"x": x, "offset": offset, "mask": mask})
    shape = dlpack.shape_of(x)
    if 0 in shape:
        raise InvalidArgumentError("x is empty", got=f"shape {shape}", allowed="sizes of 1 or more")
    dtype = dlpack.dtype_name(x)
    if dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            "x has a dtype that is not supported", got=dtype, allowed=", ".join(DTYPE_BYTES)
        )
    spec = _spec(
        shape,
        group=group,
        kernel_size=_hashable(kernel_size),
        stride=_hashable(stride),
        pad=_hashable(pad),
        dilation=_hashable(dilation),
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
        dtype=dtype,
    )
    check_arguments(spec, x, offset, mask)
    return compile_op(spec, _target(dlpack.place_of(x))).call_checked(spec, x, offset, mask)


# Describing the problem anew would take longer than a small one takes to compute.
_spec = functools.lru_cache(maxsize=256, typed=True)(DCNv3Spec.of)


@functools.lru_cache(maxsize=64)
def _target(place: str) -> str:
    """Name the target for tensors in a place: the architecture of the very GPU they are on."""
    if place == dlpack.CPU:
        return "auto"
    arch = gpu.device(int(place.partition(":")[2])).arch
    return f"cuda-{arch.replace('_', '')}"


def _hashable(value: int | Sequence[int]) -> Hashable:
    """Give a pair in any form one that the cache can look up; what is no pair, as its text."""
    if isinstance(value, Sequence):
        return tuple(value)
    return value if isinstance(value, Hashable) else repr(value)


def check_arguments(spec: DCNv3Spec, x: object, offset: object, mask: object) -> None:
    """Check dtypes and shapes of the arguments against a static problem.

    Raises
    ------
    InvalidArgumentError
        Naming the tensor, what was got and what was expected.
    """
    expected = {"x": spec.input_shape, "offset": spec.offset_shape, "mask": spec.mask_shape}
    got = {}
    for name, tensor in zip(expected, (x, offset, mask), strict=True):
        dtype = dlpack.dtype_name(tensor)
        if dtype != spec.dtype:
            raise InvalidArgumentError(
                f"{name} has another dtype than {'the operator' if name == 'x' else 'x'}",
                got=dtype,
                allowed=spec.dtype,
            )
        got[name] = dlpack.shape_of(tensor)
    for name, shape in expected.items():
        if len(got[name]) != 4:
            raise InvalidArgumentError(
                f"{name} does not have four dimensions",
                got=f"shape {got[name]}",
                allowed=f"shape {shape}",
            )
    for name, shape in expected.items():
        if got[name] != shape:
            raise InvalidArgumentError(
                f"{name} has the wrong shape",
                got=f"shape {got[name]}",
                allowed=f"shape {shape}, for x of shape {got['x']}, group={spec.group}, "
                f"{spec.points} points",
                hint=_layout_hint(spec, got, name, shape),
            )


def _layout_hint(
    spec: DCNv3Spec,
    got: dict[str, tuple[int, ...]],
    name: str,
    shape: tuple[int | None, ...],
) -> str | None:
    batch, height, width, channels = shape
    if got[name] == (batch, channels, height, width):
        return _NHWC_HINT.replace("x.", f"{name}.")
    # Would x fit its offset if it were read as NCHW?
    n, c, h, w = got["x"]
    if c % spec.group == 0:
        try:
            turned = dataclasses.replace(
                spec, batch=n, height=h, width=w, group_channels=c // spec.group
            )
        except InvalidArgumentError:
            return None
        if got[name] == (turned.offset_shape if name == "offset" else turned.mask_shape):
            return _NHWC_HINT
    return None
