"""Problems that benchmarks run: module, inputs, reference outputs, operations and bytes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dcnv3_tvm import files, frontend
from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.runners import Array, BackendRunner, gradient_runner, torch_runner
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.pytorch.operator import dcnv3
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import PyTorchOperator, with_sampling
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import (
    MAX_ERROR,
    gradient_bounds,
    largest_relative,
    model_tolerance,
    operator_bound,
)

if TYPE_CHECKING:
    from dcnv3_tvm.frontend.onnx import FormName

OFFSET_SPREAD: Final = 2.0
"""Offsets of the operator are uniform in [-OFFSET_SPREAD, OFFSET_SPREAD] pixels."""

_OFFSET_STEPS: Final = 64
"""Steps of the offsets in a pixel. Offsets lie between them, so that no sampling point is at a kink
of the bilinear interpolation, where a rounding decides between two gradients."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem that all backends compute.

    Parameters
    ----------
    slug : str
        Name of the case.
    source : DCNv3Spec or InternImage
        What this library compiles.
    module : torch.nn.Module
        PyTorch reference implementation, which peers run or export.
    inputs : dict of str to numpy.ndarray
        Arguments by name, in order; float32, but labels.
    reference : list of numpy.ndarray
        Outputs in float64, of training in float32.
    tolerance : float
        Largest error of this library.
    flops, bytes : float
        Operations (a multiply-add counts as two), and bytes of inputs, weights and outputs.
    dtype : str
        Matmul dtype of this library.
    measure : str
        Error measure, see `dcnv3_tvm.verify.tolerances`.
    own_modules : dict of str to torch.nn.Module
        By backend: as `module`, with this library's operator. They are what is run of this library
        for gradients.
    run_module : callable
        Makes a runner of `module` or an own one, of the inputs and of the number of threads.
    """

    slug: str
    source: DCNv3Spec | InternImage
    module: nn.Module
    inputs: dict[str, Array]
    reference: list[Array]
    tolerance: float
    flops: float
    bytes: float
    dtype: str = "float32"
    measure: str = MAX_ERROR
    own_modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    run_module: Callable[[Any, dict[str, Array], int], BackendRunner] = torch_runner

    @functools.cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """Folder of ONNX files, deleted with this object."""
        return files.temporary_folder("bench-")

    def onnx(self, form: FormName) -> Path:
        """Export the module to an ONNX file, unless it exists.

        Parameters
        ----------
        form : str
            How DCNv3 is expressed, see `dcnv3_tvm.frontend.export_onnx`.
        """
        # It needs TVM, which machines that run code compiled elsewhere do not have.
        from dcnv3_tvm.frontend.onnx.export import export_onnx

        path = Path(self._folder.name) / f"{form}.onnx"
        if not path.exists():
            arguments = tuple(torch.from_numpy(array) for array in self.inputs.values())
            export_onnx(self.module, path, example=arguments, form=form)
        return path


def operator_problem(spec: DCNv3Spec, seed: int = 0, *, backward: bool = False) -> Problem:
    """Create an operator problem: normal x, uniform masks, offsets that cross the borders.

    With `backward`, the outputs are the result and the gradients of x, offset and mask, for a
    normal gradient of the result.
    """
    rng = np.random.default_rng(seed)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape)
    x_shape, offset_shape, mask_shape = (tuple(int(size or 0) for size in s) for s in shapes)
    x = aligned(rng.standard_normal(x_shape, np.float32))
    steps = int(OFFSET_SPREAD * _OFFSET_STEPS)
    offset = aligned((rng.integers(-steps, steps, offset_shape) + 0.5) / _OFFSET_STEPS)
    mask = aligned(rng.random(mask_shape, np.float32))
    reference = dcnv3_reference(x, offset, mask, spec)
    bound = operator_bound(spec, x, offset, mask, reference)
    problem = Problem(
        slug=spec.slug,
        source=spec,
        module=PyTorchOperator(spec).eval(),
        inputs={"x": x, "offset": offset, "mask": mask},
        reference=[reference],
        tolerance=largest_relative([bound], [reference]),
        flops=spec.flops,
        bytes=spec.bytes,
    )
    if not backward:
        return problem
    grad = aligned(rng.standard_normal(reference.shape, np.float32))
    gradients = dcnv3_gradients(grad, x, offset, mask, spec)
    bounds = gradient_bounds(spec, grad, x, offset, mask, gradients)
    return dataclasses.replace(
        problem,
        slug=f"{spec.slug}-backward",
        inputs=problem.inputs | {"grad": grad},
        reference=[reference, *gradients],
        tolerance=max(problem.tolerance, largest_relative(bounds, gradients)),
        flops=spec.flops + spec.gradient_flops,
        bytes=spec.bytes + spec.gradient_bytes,
        own_modules={OURS: with_sampling(problem.module, _own_sampling)},
        run_module=gradient_runner,
    )


def _own_sampling(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    return dcnv3(x, offset, mask, **params.keywords())


def encoder_problem(case: EncoderCase) -> Problem:
    """Create an encoder problem with random weights.

    The reference is the PyTorch reference implementation in float64, which the tests compare with
    this library's reference operator.
    """
    model = frontend.create_model(case.variant, features_only=case.features)
    randomize_(model, seed=0)
    module = with_sampling(model)
    shape = (case.batch, 3, *case.size)
    image = aligned(np.random.default_rng(0).standard_normal(shape, np.float32))
    exact = torch_runner(
        copy.deepcopy(module).double(), {"image": image.astype(np.float64)}, torch.get_num_threads()
    )
    reference = exact.outputs(exact.call())
    weights = sum(parameter.numel() for parameter in model.parameters())
    outputs = sum(array.size for array in reference)
    measure, tolerance = model_tolerance(case.dtype)
    return Problem(
        slug=case.slug,
        source=model,
        module=module,
        inputs={"image": image},
        reference=reference,
        tolerance=tolerance,
        flops=encoder_flops(case),
        bytes=DTYPE_BYTES[case.dtype] * weights + 4.0 * (image.size + outputs),
        dtype=case.dtype,
        measure=measure,
    )


def aligned(values: Array) -> Array:
    """Copy to float32 memory with PyTorch's alignment, so that no backend copies it again."""
    return torch.empty(values.shape).copy_(torch.from_numpy(values)).numpy()


def encoder_flops(case: EncoderCase) -> float:
    """Count the operations of matmuls, convolutions and sampling."""
    model = frontend.create_model(case.variant, features_only=case.features, device="meta")
    mapping = {torch.ops.dcnv3_tvm.dcnv3: _sampling_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(torch.empty(case.batch, 3, *case.size, device="meta"))
    return float(counter.get_total_flops())


def _sampling_flops(
    x: tuple[int, ...], _offset: Any, mask: tuple[int, ...], *, group: int, **_: Any
) -> int:
    return 2 * 4 * (mask[-1] // group) * mask[0] * mask[1] * mask[2] * x[-1]
