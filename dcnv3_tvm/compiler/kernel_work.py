"""Operations of kernels, counted from their definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import tvm

from dcnv3_tvm.compiler.kernel_listing import CalledKernel, KernelArgument
from dcnv3_tvm.kernels import gemm, mlp, tile_convolution, tile_matmul
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.op.tensorir import spec_of
from dcnv3_tvm.runtime.metadata import KernelWork
from dcnv3_tvm.transform.gpu_padding import depth_multiple

MATMUL_KINDS: Final = (
    *("matmul", "convolution", tile_matmul.KERNEL, tile_convolution.KERNEL),
    *(gemm.KERNEL, mlp.KERNEL),
)
"""Kinds of kernels whose operations run at the matmul rate of their weights' dtype."""


def module_work(module: tvm.IRModule, rules: Mapping[str, str]) -> dict[str, KernelWork]:
    """Describe the operations of the kernels of a module, also those with dynamic shapes.

    Parameters
    ----------
    module : tvm.IRModule
        Holds the kernels.
    rules : dict of str to str
        Schedule rule of each kernel, by its name.
    """
    work = {}
    for name, rule in rules.items():
        function = module[name]
        arguments = [_argument(param) for param in function.params]
        tensors = [argument for argument in arguments if argument is not None]
        kernel = CalledKernel(name, rule, function, tuple(tensors[:-1]), (tensors[-1],), calls=1)
        work[name] = KernelWork(
            flops_per_output=flops_per_output(kernel), matmul=kernel.kind in MATMUL_KINDS
        )
    return work


def _argument(param: Any) -> KernelArgument | None:
    """Return shape and element type of a tensor; 0 stands for dynamic sizes."""
    if not hasattr(param, "shape"):
        return None
    return KernelArgument(tuple(static(size) or 0 for size in param.shape), str(param.dtype))


def flops_per_output(kernel: CalledKernel) -> float:
    """Count the multiplications and additions for an element of the result, without padding.

    The sampling counts as in `DCNv3Spec.flops`. Kernels of other kinds are bound by memory and
    count zero. Only sizes that are static in every kernel matter.
    """
    if kernel.kind in ("matmul", tile_matmul.KERNEL):
        return 2 * kernel.inputs[0].shape[-1]
    if kernel.kind == "convolution":
        # The weight is (tiles, kh, kw, ...).
        return 2 * math.prod(kernel.inputs[1].shape[1:3]) * kernel.inputs[0].shape[-1]
    if kernel.kind == tile_convolution.KERNEL:
        # The weight is (columns of blocks, kh, ...), and windows are square.
        return 2 * kernel.inputs[1].shape[1] ** 2 * kernel.inputs[0].shape[-1]
    if kernel.kind == gemm.KERNEL:
        return 2 * _gemm_depth(kernel)
    if kernel.kind == mlp.KERNEL:
        # The weights have one row per hidden column and per output column.
        inputs, outputs = kernel.inputs[0].shape[-1], kernel.outputs[0].shape[-1]
        return 2 * kernel.inputs[1].shape[0] * (inputs + outputs) / outputs
    if kernel.kind == "depthwise":
        return 2 * math.prod(kernel.inputs[1].shape[:2])
    if kernel.kind.startswith("dcnv3"):
        return spec_of(kernel.function).flops_per_output
    return 0


def _gemm_depth(kernel: CalledKernel) -> int:
    """Return the reduction length of a GEMM or implicit-GEMM convolution with a square window."""
    x, weight = kernel.inputs[:2]
    # Packing transposes float32 weights.
    channels, padded = x.shape[-1], weight.shape[0 if weight.dtype == gemm.ACCUMULATOR else -1]
    if gemm.round_up(channels, depth_multiple(channels)) == padded:
        return channels
    return channels * math.isqrt(padded // channels) ** 2
