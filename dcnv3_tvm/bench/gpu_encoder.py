"""Whole encoders on a GPU, compared with PyTorch eager and compiled with CUDA graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

import dcnv3_tvm
from dcnv3_tvm import frontend
from dcnv3_tvm.bench import extensions
from dcnv3_tvm.bench.backends import OURS, Backend
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.gpu_compilation import CompilePool
from dcnv3_tvm.bench.gpu_context import GpuContext
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.problems import encoder_flops
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.roofline import Roofline
from dcnv3_tvm.bench.runners import BackendRunner
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.runtime.metadata import WEIGHTS
from dcnv3_tvm.verify.pytorch_reference import Sampling, grid_sampling, with_sampling
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import model_tolerance

PLAN: Final = Plan(rounds=5, calls=12, dropped=2, pause=0.03, burst_seconds=0.3)
"""Number of calls of an encoder."""

PEER_TOLERANCE: Final = 1e-2
"""Largest relative L2 error of PyTorch in float16: on a CPU T, S and B have errors of 2e-3, and a
wrong computation is off by some tens of percent."""

CUDA_GRAPHS: Final = "reduce-overhead"
"""Mode of ``torch.compile`` that captures CUDA graphs."""

_IMAGES_AT_ONCE: Final = 8


class EncoderProblem:
    """An encoder on the GPU: image, reference outputs and PyTorch module.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    device : torch.device
        The GPU.
    sampling : callable
        Implementation of the operator in PyTorch's module.
    """

    def __init__(
        self, case: EncoderCase, device: torch.device, sampling: Sampling = grid_sampling
    ) -> None:
        model = frontend.create_model(case.variant, features_only=case.features)
        module = with_sampling(randomize_(model, seed=0)).to(device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.batch, 3, *case.size)
        # All backends get the same values, rounded to the dtype of the case.
        dtype = getattr(torch, case.dtype)
        self.image = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.reference = _reference(module, self.image)
        self.module = with_sampling(module.to(dtype), sampling)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the module's weights."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


def _reference(module: nn.Module, image: Tensor) -> list[Tensor]:
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        parts = [
            output_list(exact(image[start : start + _IMAGES_AT_ONCE].double()))
            for start in range(0, len(image), _IMAGES_AT_ONCE)
        ]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def output_list(result: Any) -> list[Tensor]:
    """Return the output tensors of a PyTorch or compiled model as a list."""
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def measure_encoder(case: EncoderCase, context: GpuContext, seconds: float) -> CaseResult:
    """Compare and time all backends at an encoder.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    context : GpuContext
        The GPU and what else the run shares.
    seconds : float
        Longest time to wait for the compilation of this library's encoder.
    """
    extended = extensions.DCNV3.import_failure is None
    suffix = " + extension" if extended else ""
    sampling = extensions.extension_sampling if extended else grid_sampling
    context.on_step(f"{case.slug}: weights, image and reference")
    problem = EncoderProblem(case, context.gpu.torch_device, sampling)
    compiled = functools.partial(_compiled_backend, problem, context)
    error_measure, tolerance = model_tolerance(case.dtype)
    outputs = sum(tensor.numel() for tensor in problem.reference)
    traffic = problem.weight_bytes + DTYPE_BYTES[case.dtype] * (problem.image.numel() + outputs)
    return context.compare(
        case.slug,
        {
            OURS: functools.partial(_our_backend, case, problem, context.pool, seconds, tolerance),
            f"torch{suffix}": functools.partial(_torch_backend, problem.module, problem, context),
            f"compile{suffix}": functools.partial(context.torch_compile.run, compiled),
        },
        problem.reference,
        Roofline.of(encoder_flops(case), traffic, context.peaks, case.dtype),
        PLAN,
        flushes=1,
        error_measure=error_measure,
    )


def _our_backend(
    case: EncoderCase,
    problem: EncoderProblem,
    pool: CompilePool,
    seconds: float,
    tolerance: float,
) -> Backend:
    path = pool.result(case, seconds)
    model = dcnv3_tvm.load(path)
    metadata = model.metadata
    image = problem.image.to(getattr(torch, metadata.entries["main"].inputs[0].dtype))
    outputs = output_list(model(image))
    peak = (
        (path / WEIGHTS).stat().st_size
        + metadata.activation_bytes["main"]
        + sum(tensor.nbytes for tensor in (image, *outputs))
    )
    return Backend(BackendRunner(lambda: model(image), output_list, peak), tolerance)


def _torch_backend(
    module: Callable[[Tensor], Any], problem: EncoderProblem, context: GpuContext
) -> Backend:
    def call() -> Any:
        with torch.no_grad():
            return module(problem.image)

    # Peak memory includes the first calls, in which CUDA graphs are captured.
    held = problem.weight_bytes + problem.image.nbytes
    return Backend(context.runner(call, output_list, held), PEER_TOLERANCE)


def _compiled_backend(problem: EncoderProblem, context: GpuContext) -> Backend:
    torch.compiler.reset()
    module = torch.compile(problem.module, mode=CUDA_GRAPHS)
    return _torch_backend(module, problem, context)
