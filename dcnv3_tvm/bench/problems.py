"""A case made ready: a PyTorch module for the peers, inputs, true outputs, and its work."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.export import OnnxFile
from dcnv3_tvm.bench.sessions import of_torch
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import TwinOperator, twin_of
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import model_tolerance, operator_bound

Array = np.ndarray[Any, np.dtype[Any]]

OFFSET_SPREAD: Final = 2.0
"""Offsets of the operator's inputs are uniform within plus or minus this many pixels."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all contestants of a case compute.

    Parameters
    ----------
    slug : str
        Name of the case.
    source : DCNv3Spec or InternImage
        What this library compiles.
    module : torch.nn.Module
        What peers run or export: the same with ``grid_sample``.
    inputs : dict of str to numpy.ndarray
        Arguments by name, in order, float32.
    reference : list of numpy.ndarray
        The outputs in float64.
    tolerance : float
        Largest error of this library.
    flops, traffic : float
        Operations (a multiply-add counts as two); bytes of inputs, weights and outputs.
    dtype : str
        What this library computes products in.
    """

    slug: str
    source: DCNv3Spec | InternImage
    module: nn.Module
    inputs: dict[str, Array]
    reference: list[Array]
    tolerance: float
    flops: float
    traffic: float
    dtype: str = "float32"

    @property
    def measure(self) -> str:
        """How errors are measured: ``"max"`` or ``"norm"``, see `model_tolerance`."""
        return model_tolerance(self.dtype)[0]

    @functools.cached_property
    def onnx(self) -> OnnxFile:
        """The module as a file, exported when first asked for."""
        return OnnxFile(self.module, self.inputs)

    @functools.cached_property
    def onnx_deform(self) -> OnnxFile:
        """The module rewritten to use DeformConv, as a file."""
        from dcnv3_tvm.bench.deform_conv import deforming, translations

        return OnnxFile(deforming(self.module), self.inputs, translations())


def operator_problem(spec: DCNv3Spec, seed: int = 0) -> Problem:
    """Make an operator problem ready: normal x, uniform masks, offsets that cross the borders."""
    rng = np.random.default_rng(seed)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape)
    x_shape, offset_shape, mask_shape = (tuple(int(size or 0) for size in s) for s in shapes)
    x = _aligned(rng.standard_normal(x_shape, np.float32))
    offset = _aligned(rng.uniform(-OFFSET_SPREAD, OFFSET_SPREAD, offset_shape))
    mask = _aligned(rng.random(mask_shape, np.float32))
    reference = dcnv3_reference(x, offset, mask, spec)
    bound = operator_bound(spec, x, offset, mask, reference)
    return Problem(
        slug=spec.slug,
        source=spec,
        module=TwinOperator(spec).eval(),
        inputs={"x": x, "offset": offset, "mask": mask},
        reference=[reference],
        tolerance=float(bound.max() / np.abs(reference).max()),
        flops=spec.flops,
        traffic=spec.bytes,
    )


def encoder_problem(case: EncoderCase, seed: int = 0) -> Problem:
    """Make an encoder ready, with random weights that deform by some pixels.

    The truth is the module of the peers in float64; a test holds it against this library's
    reference.
    """
    model = frontend.create_model(case.variant, features_only=case.features)
    randomize_(model, seed)
    twin = twin_of(model)
    shape = (case.batch, 3, *case.size)
    image = _aligned(np.random.default_rng(seed).standard_normal(shape, np.float32))
    exact = of_torch(
        copy.deepcopy(twin).double(), {"image": image.astype(np.float64)}, torch.get_num_threads()
    )
    reference = exact.outputs(exact.call())
    weights = sum(parameter.numel() for parameter in model.parameters())
    outputs = sum(array.size for array in reference)
    return Problem(
        slug=case.slug,
        source=model,
        module=twin,
        inputs={"image": image},
        reference=reference,
        tolerance=model_tolerance(case.dtype)[1],
        flops=encoder_flops(case),
        traffic=DTYPE_BYTES[case.dtype] * weights + 4.0 * (image.size + outputs),
        dtype=case.dtype,
    )


def _aligned(values: Array) -> Array:
    """Copy to float32 in memory of PyTorch's, whose alignment spares every contestant a copy."""
    return torch.empty(values.shape).copy_(torch.from_numpy(values)).numpy()


def encoder_flops(case: EncoderCase) -> float:
    """Count products, convolutions and sampling, by shapes alone."""
    model = frontend.create_model(case.variant, features_only=case.features, device="meta")
    mapping = {torch.ops.dcnv3_tvm.dcnv3: _sampling_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(torch.empty(case.batch, 3, *case.size, device="meta"))
    return float(counter.get_total_flops())


def _sampling_flops(
    x: tuple[int, ...], _offset: Any, mask: tuple[int, ...], *, group: int, **_: Any
) -> int:
    return 2 * 4 * (mask[-1] // group) * mask[0] * mask[1] * mask[2] * x[-1]
