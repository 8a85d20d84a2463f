"""Whole encoders on a GPU: this library beside PyTorch, eager and compiled with CUDA graphs."""

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
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import OURS, Contestant
from dcnv3_tvm.bench.device import Device
from dcnv3_tvm.bench.floors import Floors
from dcnv3_tvm.bench.gpu_build import Builds
from dcnv3_tvm.bench.gpu_contest import Setting, contest
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.problems import encoder_flops
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.sampling import sampling_by
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.runtime.metadata import WEIGHTS
from dcnv3_tvm.verify.pytorch_reference import twin_of
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import model_tolerance

PLAN: Final = Plan(rounds=5, calls=12, dropped=2, pause=0.03, burst_seconds=0.3)
"""How often an encoder is called."""

PEER_TOLERANCE: Final = 1e-2
"""Largest error of PyTorch in float16, as ‖error‖ / ‖reference‖: on a CPU T, S and B have errors of
2e-3, and a wrong computation is off by some tens of percent."""

CUDA_GRAPHS: Final = "reduce-overhead"
"""The mode of ``torch.compile`` that captures CUDA graphs."""

_IMAGES_AT_ONCE: Final = 8


class EncoderProblem:
    """An encoder on the device: its image, its true outputs, and PyTorch's module.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    device : torch.device
        Where it is.
    sample : callable or None
        The sampling of PyTorch's module; None for ``grid_sample``.
    """

    def __init__(
        self, case: EncoderCase, device: torch.device, sample: Callable[..., Tensor] | None = None
    ) -> None:
        model = frontend.create_model(case.variant, features_only=case.features)
        twin = twin_of(randomize_(model, seed=0)).to(device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.batch, 3, *case.size)
        # The values are such as all element types hold.
        dtype = getattr(torch, case.dtype)
        self.image = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.reference = _reference(twin, self.image)
        self.module = twin.to(dtype) if sample is None else sampling_by(twin.to(dtype), sample)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the module's weights."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


def _reference(twin: nn.Module, image: Tensor) -> list[Tensor]:
    exact = copy.deepcopy(twin).double()
    with torch.no_grad():
        parts = [
            listed(exact(image[start : start + _IMAGES_AT_ONCE].double()))
            for start in range(0, len(image), _IMAGES_AT_ONCE)
        ]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def listed(result: Any) -> list[Tensor]:
    """Return the tensors of what a model of either kind returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def measure_encoder(case: EncoderCase, setting: Setting, seconds: float) -> CaseResult:
    """Compare and time all contestants at an encoder.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    setting : Setting
        Where and with what.
    seconds : float
        To wait for our encoder at most.
    """
    device = setting.device
    extended = extensions.DCNV3.absence is None
    suffix = " + extension" if extended else ""
    setting.on_step(f"{case.slug}: weights, image and reference")
    problem = EncoderProblem(case, device.torch_device, extensions.sample if extended else None)
    eager = functools.partial(_torch, f"torch{suffix}", problem.module, problem, device)
    compiled = functools.partial(_compiled, f"compile{suffix}", problem, device)
    measure_error, allowed = model_tolerance(case.dtype)
    outputs = sum(tensor.numel() for tensor in problem.reference)
    traffic = problem.weight_bytes + DTYPE_BYTES[case.dtype] * (problem.image.numel() + outputs)
    return contest(
        case.slug,
        {
            OURS: functools.partial(_ours, case, problem, setting.builds, seconds, allowed),
            f"torch{suffix}": eager,
            f"compile{suffix}": functools.partial(setting.compiling.do, compiled),
        },
        problem.reference,
        Floors.of(encoder_flops(case), traffic, setting.peaks, case.dtype),
        PLAN,
        device,
        flushes=1,
        measure_error=measure_error,
        on_step=setting.on_step,
    )


def _ours(
    case: EncoderCase, problem: EncoderProblem, builds: Builds, seconds: float, allowed: float
) -> Contestant:
    path = builds.result(case, seconds)
    model = dcnv3_tvm.load(path)
    metadata = model.metadata
    image = problem.image.to(getattr(torch, metadata.entries["main"].inputs[0].dtype))
    outputs = listed(model(image))
    peak = (
        (path / WEIGHTS).stat().st_size
        + metadata.activation_bytes["main"]
        + sum(tensor.nbytes for tensor in (image, *outputs))
    )
    return Contestant(OURS, lambda: model(image), listed, allowed, peak_bytes=peak)


def _torch(
    name: str, module: Callable[[Tensor], Any], problem: EncoderProblem, device: Device
) -> Contestant:
    def call() -> Any:
        with torch.no_grad():
            return module(problem.image)

    # The first calls, in which CUDA graphs are captured, need the most.
    peak = problem.weight_bytes + problem.image.nbytes + device.peak_bytes(call)
    return Contestant(name, call, listed, PEER_TOLERANCE, peak_bytes=peak)


def _compiled(name: str, problem: EncoderProblem, device: Device) -> Contestant:
    torch.compiler.reset()
    return _torch(name, torch.compile(problem.module, mode=CUDA_GRAPHS), problem, device)
