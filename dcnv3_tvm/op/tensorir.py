"""DCNv3 as unscheduled TensorIR functions, built from the blocks of `dcnv3_tvm.op.sampling`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm import gpu
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.gradient import emit_grad_offset_mask, emit_grad_x
from dcnv3_tvm.op.prim_func_builder import argument, function
from dcnv3_tvm.op.sampling import emit_sampling
from dcnv3_tvm.op.sampling_kernel import SamplingKernel
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

SPEC_ATTR: Final = "dcnv3_tvm.spec"
"""Function attribute that holds the problem, as JSON; `spec_of` reads it."""

PACKED_MULTIPLE: Final = 16
"""The channels of the packed tensor are padded to a multiple of this, a size that suits the matmul
that computes it."""


@functools.lru_cache(maxsize=64)
def dcnv3(spec: DCNv3Spec, *, vector_loads: bool = False) -> tirx.PrimFunc:
    """Build the kernel that takes offset and mask as two tensors.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. Sizes that are ``None`` become variables, bound by the shape of ``x``. With
        ``spec.softmax`` the mask holds logits.
    vector_loads : bool
        Build the variant for GPUs: a block ``patch`` copies the pixels of each point in vectors of
        channels from tensors aligned for them, and the target's own exponential is used. Otherwise
        the variant for CPUs.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(x, offset, mask, out)``, with the shapes of `DCNv3Spec`, unscheduled.
    """
    kernel = SamplingKernel(spec, vector_loads)
    sizes, dtype = kernel.sizes, spec.dtype
    declare = functools.partial(_tensor, vector_loads=vector_loads)
    with function("dcnv3", _attributes(spec)) as builder:
        x = declare("x", sizes.input_shape(spec.channels), dtype)
        offset = declare("offset", sizes.output_shape(spec.offset_channels), dtype)
        mask = declare("mask", sizes.output_shape(spec.mask_channels), dtype)
        out = declare("out", sizes.output_shape(spec.channels), dtype)
        emit_sampling(kernel, x, offset, mask, out)
    return builder.get()


@functools.lru_cache(maxsize=64)
def dcnv3_packed(
    spec: DCNv3Spec,
    *,
    offset_dtype: str | None = None,
    out_dtype: str | None = None,
    center_feature: bool = False,
    vector_loads: bool = False,
) -> tirx.PrimFunc:
    """Build the kernel that takes offsets and mask logits in one tensor, as one matmul makes them.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem; ``spec.softmax`` must be set.
    offset_dtype, out_dtype : str, optional
        Element types of ``offset_mask`` and ``out``; by default the problem's.
    center_feature : bool
        Blend the result y with x: ``y * (1 - s) + x * s`` where s is the sigmoid of one logit per
        group. The output must have the size of x.
    vector_loads : bool
        As in `dcnv3`.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(x, offset_mask, out)``, unscheduled. The channels of ``offset_mask``, of
        shape (N, Ho, Wo, `packed_channels`), are ``group*P*2`` offsets, ``group*P`` mask logits,
        with `center_feature` the ``group`` logits of s, and padding that is not read.

    Raises
    ------
    InvalidArgumentError
        If ``spec.softmax`` is not set.
    """
    if not spec.softmax:
        raise InvalidArgumentError(
            "the packed kernel takes mask logits",
            got="softmax=False",
            allowed="softmax=True",
            hint="Use dataclasses.replace(spec, softmax=True), or the kernel dcnv3(spec).",
        )
    kernel = SamplingKernel(
        spec, vector_loads, mask_start=spec.offset_channels, center_feature=center_feature
    )
    sizes, dtype = kernel.sizes, spec.dtype
    packed = packed_channels(spec, center_feature=center_feature)
    declare = functools.partial(_tensor, vector_loads=vector_loads)
    with function("dcnv3_packed", _attributes(spec)) as builder:
        x = declare("x", sizes.input_shape(spec.channels), dtype)
        offset_mask = declare("offset_mask", sizes.output_shape(packed), offset_dtype or dtype)
        out = declare("out", sizes.output_shape(spec.channels), out_dtype or dtype)
        emit_sampling(kernel, x, offset_mask, offset_mask, out)
    return builder.get()


@functools.lru_cache(maxsize=64)
def dcnv3_grad_x(spec: DCNv3Spec, *, vector_loads: bool = False) -> tirx.PrimFunc:
    """Build the kernel that computes the gradient of x.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    vector_loads : bool
        As in `dcnv3`. The terms are added by atomics, in an order that is not fixed, so that the
        last bits of the result may differ from call to call.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(grad, offset, mask, grad_x)``, unscheduled, where ``grad`` is the gradient of
        the result. ``grad_x`` has the accumulation type, in which the terms of a pixel are added.
    """
    kernel = SamplingKernel(spec, vector_loads, image_dtype=spec.accumulate_dtype)
    sizes, dtype = kernel.sizes, spec.dtype
    declare = functools.partial(_tensor, vector_loads=vector_loads)
    with function("dcnv3_grad_x", _attributes(spec)) as builder:
        grad = declare("grad", sizes.output_shape(spec.channels), dtype)
        offset = declare("offset", sizes.output_shape(spec.offset_channels), dtype)
        mask = declare("mask", sizes.output_shape(spec.mask_channels), dtype)
        grad_x = declare("grad_x", sizes.input_shape(spec.channels), spec.accumulate_dtype)
        emit_grad_x(kernel, grad, offset, mask, grad_x)
    return builder.get()


@functools.lru_cache(maxsize=64)
def dcnv3_grad_offset_mask(spec: DCNv3Spec, *, vector_loads: bool = False) -> tirx.PrimFunc:
    """Build the kernel that computes the gradients of offset and mask.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. With ``spec.softmax``, the gradient of mask is that of the logits.
    vector_loads : bool
        As in `dcnv3`.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(x, offset, mask, grad, grad_offset, grad_mask)``, where ``grad`` is the
        gradient of the result, unscheduled.
    """
    kernel = SamplingKernel(spec, vector_loads)
    sizes, dtype = kernel.sizes, spec.dtype
    declare = functools.partial(_tensor, vector_loads=vector_loads)
    with function("dcnv3_grad_offset_mask", _attributes(spec)) as builder:
        x = declare("x", sizes.input_shape(spec.channels), dtype)
        offset = declare("offset", sizes.output_shape(spec.offset_channels), dtype)
        mask = declare("mask", sizes.output_shape(spec.mask_channels), dtype)
        grad = declare("grad", sizes.output_shape(spec.channels), dtype)
        grad_offset = declare("grad_offset", sizes.output_shape(spec.offset_channels), dtype)
        grad_mask = declare("grad_mask", sizes.output_shape(spec.mask_channels), dtype)
        emit_grad_offset_mask(kernel, x, offset, mask, grad, grad_offset, grad_mask)
    return builder.get()


def packed_channels(params: DCNv3Params, *, center_feature: bool = False) -> int:
    """Return the number of channels of the packed tensor of `dcnv3_packed`, with padding."""
    gates = params.group if center_feature else 0
    used = params.offset_channels + params.mask_channels + gates
    return -(-used // PACKED_MULTIPLE) * PACKED_MULTIPLE


def spec_of(func: tirx.PrimFunc) -> DCNv3Spec:
    """Return the problem for which a kernel of this module was built."""
    return DCNv3Spec.from_json(json.loads(str(func.attrs[SPEC_ATTR])))


def _attributes(spec: DCNv3Spec) -> dict[str, Any]:
    return {SPEC_ATTR: json.dumps(spec.to_json())}


def _tensor(name: str, shape: Sequence[Any], dtype: str, *, vector_loads: bool) -> Any:
    """Declare a tensor argument, aligned for vector loads or only for its elements.

    TVM would assume 64 bytes, to which NumPy arrays and slices need not be aligned. Schedules
    copy the alignment of an argument to the register buffers that cache it.
    """
    align = gpu.VECTOR_BYTES if vector_loads else DTYPE_BYTES[dtype]
    return argument(name, shape, dtype, align=align)
