"""The gradients of the operator on a GPU, compared with PyTorch and the published extension."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from dcnv3_tvm.bench import extensions
from dcnv3_tvm.bench.backends import OURS, Backend
from dcnv3_tvm.bench.gpu_cases import GradientKernel
from dcnv3_tvm.bench.gpu_compilation import load_kernel
from dcnv3_tvm.bench.gpu_context import GpuContext
from dcnv3_tvm.bench.gpu_operator import FLUSHES, PEER_TOLERANCES, PLAN, shape_of
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.roofline import Roofline
from dcnv3_tvm.compiler.compile_kernel import GRAD_OFFSET_MASK, GRAD_X
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import PyTorchOperator
from dcnv3_tvm.verify.tolerances import gradient_bounds, largest_relative

_STEPS: Final = 16
"""Steps of the offsets in a pixel. They are odd multiples of half a step, exact in every type, so
that no point is at a kink of the bilinear sampling, where a rounding would change the gradient."""

Gradients = Callable[..., list[Tensor]]
"""Function of (grad, x, offset, mask) that returns the gradients of x, offset and mask."""


def gradient_inputs(spec: DCNv3Spec, device: torch.device) -> list[Tensor]:
    """Create the gradient of the result, x, offset and mask."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    steps = torch.randint(-2 * _STEPS, 2 * _STEPS, shape_of(spec.offset_shape), **options)
    given = (
        torch.randn(shape_of(spec.output_shape), **options),
        torch.randn(shape_of(spec.input_shape), **options),
        (steps + 0.5) / _STEPS,
        torch.rand(shape_of(spec.mask_shape), **options),
    )
    return [tensor.to(getattr(torch, spec.dtype)) for tensor in given]


def load_gradients(spec: DCNv3Spec, paths: dict[str, Any], target: str) -> Gradients:
    """Load the kernels compiled by `dcnv3_tvm.bench.gpu_compilation.compile_job`, by kind."""
    kernels = {kind: load_kernel(kind, path, target) for kind, path in paths.items()}

    def compute(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor) -> list[Tensor]:
        device = tensors.device_of(x)
        sums = torch.empty_like(x, dtype=getattr(torch, spec.accumulate_dtype))
        others = torch.empty_like(offset), torch.empty_like(mask)
        kernels[GRAD_X].run(device, (grad, offset, mask, sums))
        kernels[GRAD_OFFSET_MASK].run(device, (x, offset, mask, grad, *others))
        return [sums.to(x.dtype), *others]

    return compute


def measure_gradients(spec: DCNv3Spec, context: GpuContext, seconds: float) -> CaseResult:
    """Compare and time all backends at the gradients of an operator.

    Parameters
    ----------
    spec, context, seconds
        As for `dcnv3_tvm.bench.gpu_operator.measure_operator`. Outputs are compared for the first
        image only, because the reference is computed on the CPU.
    """
    gpu = context.gpu
    context.on_step(f"{spec.slug}-backward: inputs and reference")
    arguments = gradient_inputs(spec, gpu.torch_device)
    grad, x, offset, mask = (tensor[:1].double().cpu().numpy() for tensor in arguments)
    reference = dcnv3_gradients(grad, x, offset, mask, spec)
    bounds = gradient_bounds(spec, grad, x, offset, mask, reference)
    # Rounding the gradient of x to the type of x adds an error like those of the others.
    ours_tolerance = 2 * largest_relative(bounds[1:], reference[1:])

    def backend(compute: Gradients, tolerance: float) -> Backend:
        call = functools.partial(compute, *arguments)
        held = sum(tensor.nbytes for tensor in arguments)
        runner = context.runner(call, lambda results: [tensor[:1] for tensor in results], held)
        return Backend(runner, tolerance)

    def ours() -> Backend:
        paths = {
            kind: context.pool.result(GradientKernel(kind, spec), seconds)
            for kind in (GRAD_X, GRAD_OFFSET_MASK)
        }
        return backend(load_gradients(spec, paths, gpu.target), ours_tolerance)

    builders: dict[str, Callable[[], Backend]] = {OURS: ours}
    allowed = PEER_TOLERANCES[spec.dtype]
    # In 16-bit types PyTorch's coordinates are so coarse that points are in other pixels, with
    # other gradients.
    if spec.dtype == "float32":
        eager = _autograd(spec, *arguments)
        builders["torch"] = functools.partial(backend, eager, allowed)
    if extensions.DCNV3.import_failure is None:
        compute = extensions.dcnv3_backward(spec)
        builders[extensions.DCNV3.name] = functools.partial(backend, compute, allowed)
    return context.compare(
        f"{spec.slug}-backward",
        builders,
        [torch.from_numpy(gradient).to(gpu.torch_device) for gradient in reference],
        Roofline.of(spec.gradient_flops, spec.gradient_bytes, context.peaks),
        PLAN,
        flushes=FLUSHES,
    )


def _autograd(spec: DCNv3Spec, grad: Tensor, *arguments: Tensor) -> Gradients:
    """Return the backward pass of PyTorch's sampling, after a forward pass that is not timed."""
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    result = PyTorchOperator(spec)(*leaves)
    return lambda *_: list(torch.autograd.grad(result, leaves, grad, retain_graph=True))
