"""``dcnv3_tvm.dcnv3``: the operator on tensors of any library, differentiable on PyTorch's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dcnv3_tvm.compiler import functional
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack

TensorT = TypeVar("TensorT")


def dcnv3(
    x: TensorT,
    offset: TensorT,
    mask: TensorT,
    *,
    out: TensorT | None = None,
    **params: Unpack[DCNv3Keywords],
) -> TensorT:
    """Compute DCNv3.

    A kernel is compiled for each new combination of shape, parameters and dtype, which takes about
    0.2 s on a CPU and 1 s for a GPU, and kept in memory and on disk; after eight shapes, one kernel
    serves all others. PyTorch's tensors that require gradients get them from
    ``torch.ops.dcnv3_tvm.dcnv3``.

    Parameters
    ----------
    x : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
        Shape (N, H, W, C), channels-last; float64, float32, float16 or bfloat16 (in NumPy by
        ml_dtypes). Tensors on an NVIDIA GPU are processed there, on the current stream.
    offset : same kind, dtype and device
        Shape (N, Ho, Wo, group*P*2): for every point x before y, in pixels before `offset_scale`.
    mask : same kind, dtype and device
        Shape (N, Ho, Wo, group*P): one factor for each point; logits with `softmax`.
    out : same kind, dtype and device, optional
        Shape of the result, which is written to it. Contiguous and writable, and it shares no
        memory with the inputs. Not with gradients.
    **params
        ``group`` and, optionally, ``kernel_size``, ``stride``, ``pad``, ``dilation``,
        ``offset_scale``, ``remove_center`` and ``softmax``, as for `dcnv3_tvm.spec.DCNv3Params`;
        P is its number of points.

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
    if not _requires_gradients(x, offset, mask):
        return functional.dcnv3(x, offset, mask, out=out, **params)
    if out is not None:
        raise InvalidArgumentError(
            "out is given for tensors that require gradients",
            hint="Leave out= away, or call under torch.no_grad().",
        )
    from dcnv3_tvm.pytorch import operator

    tensors = (cast("Any", each) for each in (x, offset, mask))
    return cast("TensorT", operator.dcnv3(*tensors, **params))


def _requires_gradients(x: object, offset: object, mask: object) -> bool:
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and torch.is_grad_enabled()
        and (
            getattr(x, "requires_grad", False)
            or getattr(offset, "requires_grad", False)
            or getattr(mask, "requires_grad", False)
        )
    )
