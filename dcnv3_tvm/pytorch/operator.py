"""DCNv3 as a PyTorch operator: ``torch.ops.dcnv3_tvm.dcnv3``.

Importing the module defines the operator once. It runs this library's kernel on the memory of the
tensors (DLPack, no copy of contiguous tensors), on the processor or the GPU they are on, has a fake
implementation, and so works in ``torch.compile(fullgraph=True)`` and ``torch.export``; the importer
of this library finds it in an exported program under its name.

The library is made for inference: the operator has no gradient. A call on tensors that require one
is fine; going backward through it raises `InvalidArgumentError`. (``torch.compile`` traces the
backward pass ahead of time and raises at once, hence compile under ``torch.no_grad()``.)
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from dcnv3_tvm.compiler import functional
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Spec, pair

OP_NAME: Final = "dcnv3_tvm::dcnv3"

_CONSTRAIN: Final[Callable[[Any, Callable[[], str]], None]] = torch._check
_SCHEMA: Final = (
    "(Tensor x, Tensor offset, Tensor mask, int[2] kernel_size, int[2] stride, int[2] pad, "
    "int[2] dilation, int group, float offset_scale, bool remove_center, bool softmax) -> Tensor"
)


def dcnv3(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    *,
    group: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    pad: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> torch.Tensor:
    """Call ``torch.ops.dcnv3_tvm.dcnv3`` with keyword arguments and defaults.

    Parameters
    ----------
    x, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P), of one dtype.
    group, kernel_size, stride, pad, dilation, offset_scale, remove_center, softmax
        As in `dcnv3_tvm.DCNv3Spec`.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), contiguous, of the dtype of x.

    Raises
    ------
    InvalidArgumentError
        If a shape, a dtype or a parameter does not fit.

    Examples
    --------
    >>> import torch
    >>> from dcnv3_tvm.pytorch.operator import dcnv3
    >>> x, mask = torch.rand(1, 6, 5, 8), torch.rand(1, 6, 5, 18)
    >>> dcnv3(x, torch.zeros(1, 6, 5, 36), mask, group=2).shape
    torch.Size([1, 6, 5, 8])
    """
    result: torch.Tensor = torch.ops.dcnv3_tvm.dcnv3(
        x,
        offset,
        mask,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(pad, "pad"),
        pair(dilation, "dilation"),
        group,
        offset_scale,
        remove_center,
        softmax,
    )
    return result


def _run(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    group: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> torch.Tensor:
    result: torch.Tensor = functional.dcnv3(
        x,
        offset,
        mask,
        group=group,
        kernel_size=kernel_size,
        stride=stride,
        pad=pad,
        dilation=dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
    )
    return result


def _fake(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    group: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> torch.Tensor:
    """Check the call and allocate its result, on tensors without data."""
    dtypes = {"x": x.dtype, "offset": offset.dtype, "mask": mask.dtype}
    if len(set(dtypes.values())) > 1 or str(x.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise InvalidArgumentError(
            "x, offset and mask are not of one floating-point dtype",
            got=", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items()),
            allowed=f"one of {', '.join(DTYPE_BYTES)} for all three",
        )
    sizes = [size if type(size) is int else None for size in x.shape[:-1]]
    spec = DCNv3Spec.of(
        (*sizes, int(x.shape[-1])),
        group=group,
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        pad=tuple(pad),
        dilation=tuple(dilation),
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
    )
    leading = [x.shape[0], *(spec.output_extent(x.shape[1 + axis], axis) for axis in range(2))]
    _check_shape("offset", offset, [*leading, spec.group * spec.points * 2])
    _check_shape("mask", mask, [*leading, spec.group * spec.points])
    return x.new_empty([*leading, spec.channels])


def _check_shape(name: str, tensor: torch.Tensor, expected: list[Any]) -> None:
    got = list(tensor.shape)
    wrong = len(got) != len(expected) or any(
        type(a) is int and type(b) is int and a != b for a, b in zip(got, expected, strict=False)
    )
    if wrong:
        raise InvalidArgumentError(
            f"{name} does not fit x and the parameters",
            got=f"shape {tuple(got)}",
            allowed=f"shape {tuple(expected)}",
        )
    for a, b in zip(got, expected, strict=True):
        # A size known only at run time becomes a constraint of the traced program.
        _CONSTRAIN(a == b, lambda: f"{name} has shape {got} where {expected} is needed")


def _refuse_gradient(_context: Any, *_gradients: torch.Tensor) -> None:
    raise InvalidArgumentError(
        "dcnv3_tvm::dcnv3 has no gradient: this library is made for inference",
        hint="Call the model under torch.no_grad(), or train with the original operator.",
    )


def _register() -> None:
    # The registry of operators belongs to the process, and outlives a reload of this module.
    if hasattr(torch.ops.dcnv3_tvm, "dcnv3"):
        return
    torch.library.define(OP_NAME, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(OP_NAME, ("CPU", "CUDA"))(_run)
    torch.library.register_fake(OP_NAME)(_fake)
    torch.library.register_autograd(OP_NAME, _refuse_gradient)


_register()
