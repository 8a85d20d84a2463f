"""Compute the gradients of DCNv3 on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

from dcnv3_tvm import targets
from dcnv3_tvm.compiler.compile_kernel import GRAD_OFFSET_MASK, GRAD_X, compile_kernel
from dcnv3_tvm.compiler.functional import target_of
from dcnv3_tvm.compiler.kernel_spec import kernel_spec
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.spec import DCNv3Spec

TensorT = TypeVar("TensorT")


def grad_x(spec: DCNv3Spec, grad: TensorT, offset: TensorT, mask: TensorT, result: TensorT) -> None:
    """Compute the gradient of x.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, static.
    grad, offset, mask : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
        Gradient of the result, offset and mask, with the shapes and the dtype of the problem.
    result : same kind
        Gradient of x, in the accumulation type. On GPUs its terms are added in no fixed order.
    """
    device = tensors.device_of(grad)
    if spec.batch == 0:
        return
    kernel = compile_kernel(GRAD_X, kernel_spec(GRAD_X, _free(spec)), _target(device), "default")
    kernel.run(device, (grad, offset, mask, result))


def grad_offset_mask(
    spec: DCNv3Spec,
    x: TensorT,
    offset: TensorT,
    mask: TensorT,
    grad: TensorT,
    results: tuple[TensorT, TensorT],
) -> None:
    """Compute the gradients of offset and mask.

    Parameters
    ----------
    spec, x, offset, mask, grad
        As for `grad_x`.
    results : tuple
        Gradients of offset and mask.
    """
    device = tensors.device_of(grad)
    if spec.batch == 0:
        return
    compiled = kernel_spec(GRAD_OFFSET_MASK, _free(spec))
    kernel = compile_kernel(GRAD_OFFSET_MASK, compiled, _target(device), "default")
    kernel.run(device, (x, offset, mask, grad, *results))


@functools.lru_cache(maxsize=64)
def _target(device: str) -> str:
    return targets.target_text(target_of(device))


def _free(spec: DCNv3Spec) -> DCNv3Spec:
    """Make batch and height dynamic, which makes the kernels no slower."""
    return dataclasses.replace(spec, batch=None, height=None)
