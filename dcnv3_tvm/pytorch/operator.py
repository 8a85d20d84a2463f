"""DCNv3 as a PyTorch operator: ``torch.ops.dcnv3_tvm.dcnv3``.

Importing the module registers the operator once. It runs this library's kernel on the memory of the
tensors (through DLPack, without copying contiguous tensors), on the CPU or GPU that holds them. Its
fake implementation makes it work in ``torch.compile(fullgraph=True)`` and ``torch.export``.

The element types of the arguments may differ, as autocast makes them: the operator is computed in
the wider type of x and offset, and the result has the type of x. Autocast does not cast its inputs.

The operator is differentiable once, also in ``torch.func`` and under ``torch.vmap``; its gradients
are operators of their own (`dcnv3_tvm.pytorch.gradient`). A second derivative raises
`InvalidArgumentError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcnv3_tvm.compiler import functional
from dcnv3_tvm.pytorch import gradient
from dcnv3_tvm.pytorch.registration import check_dtypes, computed_dtype, output_shape, register
from dcnv3_tvm.spec import DCNv3Keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack


def dcnv3(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    """Call ``torch.ops.dcnv3_tvm.dcnv3``.

    Parameters
    ----------
    x, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P), of floating-point
        dtypes.
    **params
        As for `dcnv3_tvm.spec.DCNv3Params`.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), contiguous, of the dtype of x.

    Raises
    ------
    InvalidArgumentError
        If a shape, a dtype or a parameter is not valid.

    Examples
    --------
    >>> import torch
    >>> from dcnv3_tvm.pytorch.operator import dcnv3
    >>> x, mask = torch.rand(1, 6, 5, 8), torch.rand(1, 6, 5, 18)
    >>> dcnv3(x, torch.zeros(1, 6, 5, 36), mask, group=2).shape
    torch.Size([1, 6, 5, 8])
    """
    result: torch.Tensor = _call(x, offset, mask, **params)
    return result


def dcnv3_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of x, offset and mask; autograd calls the operators below itself.

    Parameters
    ----------
    grad : torch.Tensor
        Gradient of the result, of its shape.
    x, offset, mask, **params
        As for `dcnv3`.

    Returns
    -------
    tuple of torch.Tensor
        Gradients of the shapes and dtypes of x, offset and mask; with ``softmax=True`` the last is
        that of the logits.

    Raises
    ------
    InvalidArgumentError
        If a shape, a dtype or a parameter is not valid.
    """
    arguments = grad, x, offset, mask
    return gradient.grad_x(*arguments, **params), *gradient.grad_offset_mask(*arguments, **params)


def _compute(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    check_dtypes({"x": x, "offset": offset, "mask": mask})
    dtype = computed_dtype(x.dtype, offset.dtype, mask.dtype, softmax=params.get("softmax", False))
    result = functional.dcnv3(x.to(dtype), offset.to(dtype), mask.to(dtype), **params)
    return result.to(x.dtype)


def _fake(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    return x.new_empty(output_shape(x, offset, mask, **params))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    arguments, params = (grad, *ctx.saved_tensors), ctx.params
    needs_x, *needs_others = ctx.needs_input_grad
    grad_x = grad_offset = grad_mask = None
    if needs_x:
        grad_x = gradient.grad_x(*arguments, **params)
    if any(needs_others):
        grad_offset, grad_mask = gradient.grad_offset_mask(*arguments, **params)
    return grad_x, grad_offset, grad_mask


_call = register("dcnv3", ("x", "offset", "mask"), 1, _compute, _fake, _backward)
