"""The operator on a GPU, compared with PyTorch and the published extensions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dcnv3_tvm.bench.backends import OURS, Backend
from dcnv3_tvm.bench.extensions import EXTENSIONS, Extension
from dcnv3_tvm.bench.gpu_cases import OURS_ONLY, with_logits
from dcnv3_tvm.bench.gpu_compilation import load_kernel
from dcnv3_tvm.bench.gpu_context import GpuContext
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.problems import OFFSET_SPREAD
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.roofline import Roofline
from dcnv3_tvm.bench.runners import BackendRunner
from dcnv3_tvm.compiler.compile_kernel import DCNV3
from dcnv3_tvm.compiler.operator import CompiledOperator
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import PyTorchOperator
from dcnv3_tvm.verify.tolerances import largest_relative, operator_bound

PLAN: Final = Plan(rounds=5, calls=20, dropped=4, pause=0.01, burst_seconds=0.15)
"""Number of calls of an operator; the pause is short, because a GPU has no spinning threads."""

FLUSHES: Final = 8
"""Repeats of the cache flush: enough for the host to run ahead of the GPU."""

READY: Final = f"{OURS}, ready mask"
"""Name of this library's kernel that takes a mask like the peers, and not logits."""

PEER_TOLERANCES: Final = {"float32": 1e-3, "float16": 2e-2}
"""Largest error of an extension by dtype, which is several roundings; a wrong computation is off by
far more."""

GRID_SAMPLE_TOLERANCES: Final = {"float32": 1e-3, "float16": 0.25}
"""Largest error of PyTorch's ``grid_sample`` by dtype. In float16 its coordinates are also float16:
multiples of a quarter beyond 256 pixels."""

_IMAGES_AT_ONCE: Final = 8


@dataclasses.dataclass(frozen=True)
class OperatorInputs:
    """Tensors of an operator problem on the GPU.

    Parameters
    ----------
    x, offset, mask : Tensor
        Inputs in the dtype of the problem; the mask is the rounded softmax of the logits.
    logits : Tensor
        Mask before the softmax.
    reference, softmax_reference : Tensor
        Float64 outputs for the rounded mask, and for the exact softmax of the logits.
    """

    x: Tensor
    offset: Tensor
    mask: Tensor
    logits: Tensor
    reference: Tensor
    softmax_reference: Tensor

    def arguments(self, spec: DCNv3Spec) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, offset, and the mask that the operator takes: weights or logits."""
        return self.x, self.offset, self.logits if spec.softmax else self.mask


def operator_inputs(spec: DCNv3Spec, device: torch.device) -> OperatorInputs:
    """Create normal x and logits, and offsets that cross the borders.

    The reference is the PyTorch reference implementation in float64, which the tests compare with
    this library's reference operator.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    options: dict[str, Any] = {"generator": generator, "device": device}
    x = torch.randn(shape_of(spec.input_shape), **options).to(dtype)
    offset = torch.rand(shape_of(spec.offset_shape), **options).to(dtype)
    offset = (2 * offset - 1) * OFFSET_SPREAD
    logits = torch.randn(shape_of(spec.mask_shape), **options).to(dtype)
    reference, softmax_reference = [], []
    operator = PyTorchOperator(spec)
    mask = torch.empty_like(logits)
    for start in range(0, x.shape[0], _IMAGES_AT_ONCE):
        part = slice(start, start + _IMAGES_AT_ONCE)
        exact = _softmax(logits[part].double(), spec)
        mask[part] = exact.to(dtype)
        given = x[part].double(), offset[part].double()
        reference.append(operator(*given, mask[part].double()))
        softmax_reference.append(operator(*given, exact))
    return OperatorInputs(
        x, offset, mask, logits, torch.cat(reference), torch.cat(softmax_reference)
    )


def _softmax(logits: Tensor, spec: DCNv3Spec) -> Tensor:
    per_group = logits.reshape(*logits.shape[:3], spec.group, spec.points)
    return per_group.softmax(-1).flatten(-2)


def shape_of(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Return a static shape of a specification."""
    return tuple(int(size or 0) for size in shape)


def tolerance(spec: DCNv3Spec, inputs: OperatorInputs) -> float:
    """Bound this library's error relative to max|reference|.

    Computed from the first image only, which saves time; the bounds of the others are similar.
    """
    exact = inputs.softmax_reference if spec.softmax else inputs.reference
    reference = exact[:1].cpu().numpy()
    x, offset, mask = (tensor[:1].double().cpu().numpy() for tensor in inputs.arguments(spec))
    return largest_relative([operator_bound(spec, x, offset, mask, reference)], [reference])


def load_operator(spec: DCNv3Spec, path: Path, target: str) -> Callable[..., Tensor]:
    """Load an operator compiled by `dcnv3_tvm.bench.gpu_compilation.compile_job`."""
    return CompiledOperator(spec, load_kernel(DCNV3, path, target))


def measure_operator(spec: DCNv3Spec, context: GpuContext, seconds: float) -> CaseResult:
    """Compare and time all backends at an operator.

    Parameters
    ----------
    spec : DCNv3Spec
        The operator, whose mask holds weights, not logits.
    context : GpuContext
        The GPU and what else the run shares.
    seconds : float
        Longest time to wait for the compilation of this library's kernels.
    """
    context.on_step(f"{spec.slug}: inputs and reference")
    inputs = operator_inputs(spec, context.gpu.torch_device)
    builders: dict[str, Callable[[], Backend]] = {
        OURS: functools.partial(_our_backend, with_logits(spec), inputs, context, seconds),
        READY: functools.partial(_our_backend, spec, inputs, context, seconds),
    }
    if spec.dtype != OURS_ONLY:
        eager = PyTorchOperator(spec).eval()
        builders["torch"] = functools.partial(_torch_backend, eager, spec, inputs, context)
        compiled = functools.partial(_compiled_backend, eager, spec, inputs, context)
        builders["compile"] = functools.partial(context.torch_compile.run, compiled)
        for extension in EXTENSIONS:
            if extension.import_failure is None:
                build = functools.partial(_extension_backend, extension, spec, inputs, context)
                builders[extension.name] = build
    return context.compare(
        spec.slug,
        builders,
        [inputs.reference],
        Roofline.of(spec.flops, spec.bytes, context.peaks),
        PLAN,
        flushes=FLUSHES,
    )


def _our_backend(
    spec: DCNv3Spec, inputs: OperatorInputs, context: GpuContext, seconds: float
) -> Backend:
    operator = load_operator(spec, context.pool.result(spec, seconds), context.gpu.target)
    arguments = inputs.arguments(spec)
    runner = _runner(functools.partial(operator, *arguments), arguments, context)
    reference = [inputs.softmax_reference] if spec.softmax else None
    return Backend(runner, tolerance(spec, inputs), reference)


def _torch_backend(
    module: Callable[..., Tensor], spec: DCNv3Spec, inputs: OperatorInputs, context: GpuContext
) -> Backend:
    arguments = inputs.arguments(spec)
    runner = _runner(lambda: module(*arguments), arguments, context)
    return Backend(runner, GRID_SAMPLE_TOLERANCES[spec.dtype])


def _compiled_backend(
    module: torch.nn.Module, spec: DCNv3Spec, inputs: OperatorInputs, context: GpuContext
) -> Backend:
    torch.compiler.reset()
    return _torch_backend(torch.compile(module), spec, inputs, context)


def _extension_backend(
    extension: Extension, spec: DCNv3Spec, inputs: OperatorInputs, context: GpuContext
) -> Backend:
    arguments = inputs.arguments(spec)
    call = extension.prepare(extension.loaded, *arguments, spec)
    return Backend(_runner(call, arguments, context), PEER_TOLERANCES[spec.dtype])


def _runner(
    call: Callable[[], Tensor], arguments: Sequence[Tensor], context: GpuContext
) -> BackendRunner:
    return context.runner(call, lambda y: [y], sum(tensor.nbytes for tensor in arguments))
