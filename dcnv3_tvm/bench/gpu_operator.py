"""The operator on a GPU: this library beside PyTorch and the published extensions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dcnv3_tvm.bench.contestants import OURS, Contestant
from dcnv3_tvm.bench.device import Device
from dcnv3_tvm.bench.extensions import EXTENSIONS
from dcnv3_tvm.bench.floors import Floors
from dcnv3_tvm.bench.gpu_build import Builds
from dcnv3_tvm.bench.gpu_cases import OURS_ONLY, with_logits
from dcnv3_tvm.bench.gpu_contest import Setting, contest
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.problems import OFFSET_SPREAD
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.compiler.operator import CompiledOperator, DeviceLibrary
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.pytorch_reference import TwinOperator
from dcnv3_tvm.verify.tolerances import operator_bound

PLAN: Final = Plan(rounds=5, calls=20, dropped=4, pause=0.01, burst_seconds=0.15)
"""How often an operator is called; the pause is short, because a GPU has no threads that spin."""

FLUSHES: Final = 8
"""Writes of the buffer that drives the cache out: enough for the host to get ahead."""

READY: Final = f"{OURS}, ready mask"
"""This library's kernel that takes a mask, as its peers do, and not logits."""

PEER_TOLERANCES: Final = {"float32": 1e-3, "float16": 2e-2}
"""Largest error of an extension by dtype, as max|error| / max|reference|: of several roundings to
its type, where a wrong computation is off by far more."""

TWIN_TOLERANCES: Final = {"float32": 1e-3, "float16": 0.25}
"""Largest error of PyTorch's ``grid_sample``, as above. In float16 it has its coordinates in that
type, too: beyond 256 pixels they are multiples of a quarter."""

_IMAGES_AT_ONCE: Final = 8


@dataclasses.dataclass(frozen=True)
class OperatorInputs:
    """A problem's tensors on the device.

    Parameters
    ----------
    x, offset, mask : Tensor
        In the problem's dtype; the mask is ready.
    logits : Tensor
        Those whose softmax the mask is, but for its rounding.
    reference, softmax_reference : Tensor
        The true outputs, in float64: of the mask as it is, and of the logits.
    """

    x: Tensor
    offset: Tensor
    mask: Tensor
    logits: Tensor
    reference: Tensor
    softmax_reference: Tensor


def operator_inputs(spec: DCNv3Spec, device: torch.device, seed: int = 0) -> OperatorInputs:
    """Make normal x and logits, and offsets that cross the borders.

    The truth is the twin in float64; a test holds that against this library's reference.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    options: dict[str, Any] = {"generator": generator, "device": device}
    x = torch.randn(_shape(spec.input_shape), **options).to(dtype)
    offset = torch.rand(_shape(spec.offset_shape), **options).to(dtype)
    offset = (2 * offset - 1) * OFFSET_SPREAD
    logits = torch.randn(_shape(spec.mask_shape), **options).to(dtype)
    reference, softmax_reference = [], []
    twin = TwinOperator(spec)
    mask = torch.empty_like(logits)
    for start in range(0, x.shape[0], _IMAGES_AT_ONCE):
        part = slice(start, start + _IMAGES_AT_ONCE)
        exact = _softmax(logits[part].double(), spec)
        mask[part] = exact.to(dtype)
        given = x[part].double(), offset[part].double()
        reference.append(twin(*given, mask[part].double()))
        softmax_reference.append(twin(*given, exact))
    return OperatorInputs(
        x, offset, mask, logits, torch.cat(reference), torch.cat(softmax_reference)
    )


def _softmax(logits: Tensor, spec: DCNv3Spec) -> Tensor:
    per_group = logits.reshape(*logits.shape[:3], spec.group, spec.points)
    return per_group.softmax(-1).flatten(-2)


def _shape(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    return tuple(int(size or 0) for size in shape)


def tolerance(spec: DCNv3Spec, inputs: OperatorInputs) -> float:
    """Bound this library's error, as a fraction of max|reference|.

    From the first image: its bound is like those of the others, and takes a CPU less time.
    """
    mask = inputs.logits if spec.softmax else inputs.mask
    reference = (inputs.softmax_reference if spec.softmax else inputs.reference)[:1].cpu().numpy()
    x, offset, given = (
        tensor[:1].double().cpu().numpy() for tensor in (inputs.x, inputs.offset, mask)
    )
    bound = operator_bound(spec, x, offset, given, reference)
    return float(bound.max() / np.abs(reference).max())


def load_operator(spec: DCNv3Spec, path: Path, target: str) -> Callable[..., Tensor]:
    """Open an operator that `dcnv3_tvm.bench.gpu_build.build` has compiled."""
    return CompiledOperator(
        spec, resolve_target(target), "dcnv3", "", DeviceLibrary(path.read_bytes())
    )


def measure_operator(spec: DCNv3Spec, setting: Setting, seconds: float) -> CaseResult:
    """Compare and time all contestants at a problem.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, with a ready mask.
    setting : Setting
        Where and with what.
    seconds : float
        To wait for our kernels at most.
    """
    device, builds = setting.device, setting.builds
    setting.on_step(f"{spec.slug}: inputs and reference")
    inputs = operator_inputs(spec, device.torch_device)
    ours = functools.partial(_ours, inputs=inputs, device=device, builds=builds, seconds=seconds)
    makers: dict[str, Callable[[], Contestant]] = {
        OURS: functools.partial(ours, OURS, with_logits(spec)),
        READY: functools.partial(ours, READY, spec),
    }
    if spec.dtype != OURS_ONLY:
        eager = TwinOperator(spec).eval()
        makers["torch"] = functools.partial(_twin, "torch", eager, inputs, device)
        compiled = functools.partial(_compiled, eager, inputs, device)
        makers["compile"] = functools.partial(setting.compiling.do, compiled)
        for extension in EXTENSIONS:
            if extension.absence is None:
                make = functools.partial(_extension, extension, spec, inputs, device)
                makers[extension.name] = make
    return contest(
        spec.slug,
        makers,
        [inputs.reference],
        Floors.of(spec.flops, spec.bytes, setting.peaks),
        PLAN,
        device,
        flushes=FLUSHES,
        on_step=setting.on_step,
    )


def _contestant(
    name: str,
    call: Callable[[], Tensor],
    arguments: tuple[Tensor, ...],
    allowed: float,
    device: Device,
    reference: Tensor | None = None,
) -> Contestant:
    held = sum(tensor.nbytes for tensor in arguments)
    return Contestant(
        name,
        call,
        lambda y: [y],
        allowed,
        reference=None if reference is None else [reference],
        peak_bytes=held + device.peak_bytes(call),
    )


def _ours(
    name: str,
    spec: DCNv3Spec,
    inputs: OperatorInputs,
    device: Device,
    builds: Builds,
    seconds: float,
) -> Contestant:
    operator = load_operator(spec, builds.result(spec, seconds), device.target)
    arguments = (inputs.x, inputs.offset, inputs.logits if spec.softmax else inputs.mask)
    return _contestant(
        name,
        functools.partial(operator, *arguments),
        arguments,
        tolerance(spec, inputs),
        device,
        inputs.softmax_reference if spec.softmax else None,
    )


def _twin(
    name: str, module: Callable[..., Tensor], inputs: OperatorInputs, device: Device
) -> Contestant:
    arguments = (inputs.x, inputs.offset, inputs.mask)
    allowed = TWIN_TOLERANCES[str(inputs.x.dtype).removeprefix("torch.")]
    return _contestant(name, lambda: module(*arguments), arguments, allowed, device)


def _compiled(module: torch.nn.Module, inputs: OperatorInputs, device: Device) -> Contestant:
    torch.compiler.reset()
    return _twin("compile", torch.compile(module), inputs, device)


def _extension(
    extension: Any, spec: DCNv3Spec, inputs: OperatorInputs, device: Device
) -> Contestant:
    arguments = (inputs.x, inputs.offset, inputs.mask)
    call = extension.prepare(extension.loaded, *arguments, spec)
    allowed = PEER_TOLERANCES[spec.dtype]
    return _contestant(extension.name, call, arguments, allowed, device)
