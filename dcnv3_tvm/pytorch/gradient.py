"""The gradients of DCNv3 as PyTorch operators, which autograd calls.

``torch.ops.dcnv3_tvm.dcnv3_grad_x`` computes the gradient of x,
``torch.ops.dcnv3_tvm.dcnv3_grad_offset_mask`` those of offset and mask, so that autograd computes
only what is needed. They take the gradient of the result, the arguments of the operator and its
parameters. `dcnv3_tvm.op.reference_gradient` states the formulas.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from dcnv3_tvm.compiler import gradients
from dcnv3_tvm.compiler.argument_checks import check_shapes, check_tensors
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.pytorch.registration import (
    check_devices,
    check_dtypes,
    check_shape,
    computed_dtype,
    output_shape,
    register,
)
from dcnv3_tvm.spec import DCNv3Keywords, DCNv3Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ARGUMENTS: Final = ("grad", "x", "offset", "mask")

# Constructing a specification takes longer than computing a small problem.
_cached_spec = functools.lru_cache(maxsize=256, typed=True)(DCNv3Spec.of)


def _prepare(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> tuple[DCNv3Spec, list[torch.Tensor]]:
    """Check a call; returns the problem, and its tensors in the type in which it is computed."""
    arguments = dict(zip(_ARGUMENTS, (grad, x, offset, mask), strict=True))
    check_dtypes(arguments)
    check_devices(arguments)
    dtype = computed_dtype(x.dtype, offset.dtype, mask.dtype, softmax=params.get("softmax", False))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in params.items()
    }
    spec = _cached_spec(tuple(x.shape), dtype=str(dtype).removeprefix("torch."), **values)
    check_tensors(x, offset, mask)
    tensors = [tensor.to(dtype) for tensor in (grad, x, offset, mask)]
    check_shapes(spec, *tensors[1:])
    check_shape("grad", grad, list(spec.output_shape))
    return spec, tensors


def _compute_grad_x(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> torch.Tensor:
    spec, (grad, _, offset, mask) = _prepare(grad, x, offset, mask, **params)
    result = x.new_empty(x.shape, dtype=getattr(torch, spec.accumulate_dtype))
    gradients.grad_x(spec, grad, offset, mask, result)
    return result.to(x.dtype)


def _compute_grad_offset_mask(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> tuple[torch.Tensor, torch.Tensor]:
    types = offset.dtype, mask.dtype
    spec, (grad, x, offset, mask) = _prepare(grad, x, offset, mask, **params)
    results = offset.new_empty(offset.shape), mask.new_empty(mask.shape)
    gradients.grad_offset_mask(spec, x, offset, mask, grad, results)
    return results[0].to(types[0]), results[1].to(types[1])


def _check_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> None:
    check_dtypes({"grad": grad})
    check_devices({"grad": grad, "x": x})
    check_shape("grad", grad, output_shape(x, offset, mask, **params))


def _fake_grad_x(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> torch.Tensor:
    _check_fake(grad, x, offset, mask, **params)
    return x.new_empty(x.shape)


def _fake_grad_offset_mask(
    grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    **params: Unpack[DCNv3Keywords],
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fake(grad, x, offset, mask, **params)
    return offset.new_empty(offset.shape), mask.new_empty(mask.shape)


def _raise_in_backward(_context: Any, *_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    raise InvalidArgumentError(
        "DCNv3 has no second derivatives",
        hint="Differentiate once, without create_graph=True.",
    )


grad_x = register("dcnv3_grad_x", _ARGUMENTS, 1, _compute_grad_x, _fake_grad_x, _raise_in_backward)
"""Compute the gradient of x."""

grad_offset_mask = register(
    "dcnv3_grad_offset_mask",
    _ARGUMENTS,
    2,
    _compute_grad_offset_mask,
    _fake_grad_offset_mask,
    _raise_in_backward,
)
"""Compute the gradients of offset and mask."""
