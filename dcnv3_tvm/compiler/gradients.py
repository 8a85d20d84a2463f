"""Compute the gradients of DCNv3 on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

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
    _run(GRAD_X, spec, (grad, offset, mask, result))


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
    _run(GRAD_OFFSET_MASK, spec, (x, offset, mask, grad, *results))


def _run(kind: str, spec: DCNv3Spec, arguments: Sequence[Any]) -> None:
    if spec.batch == 0:
        return
    device = tensors.device_of(arguments[0])
    kernel = compile_kernel(kind, _compiled_spec(kind, spec), _target(device), "default")
    kernel.run(device, arguments)


@functools.lru_cache(maxsize=64)
def _target(device: str) -> str:
    return targets.target_text(target_of(device))


def training_spec(spec: DCNv3Spec) -> DCNv3Spec:
    """Make batch and height dynamic, which makes the gradient kernels no slower."""
    return dataclasses.replace(spec, batch=None, height=None)


@functools.lru_cache(maxsize=256)
def _compiled_spec(kind: str, spec: DCNv3Spec) -> DCNv3Spec:
    return kernel_spec(kind, training_spec(spec))
