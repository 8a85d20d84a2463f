"""DCNv3 forward as TensorIR: unscheduled PrimFuncs, built of `dcnv3_tvm.op.sampling`."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import dataclasses
import functools
import json

from tvm import tirx
from tvm.script import tirx as T

from dcnv3_tvm import gpu
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import KERNEL_ATTR, int64
from dcnv3_tvm.op.sampling import blocks, extents_of, sizes_of
from dcnv3_tvm.spec import DCNv3Spec

SPEC_ATTR = "dcnv3_tvm.spec"
"""Function attribute that holds the problem, as JSON; `spec_of` reads it."""

CENTER_ATTR = "dcnv3_tvm.center_feature"
"""Function attribute of the kernels that blend their result with their input."""

PACKED_MULTIPLE = 16
"""Offsets, logits and gates packed in one tensor are filled up to a multiple of so many channels:
then the product that makes them has whole vectors."""


@functools.lru_cache(maxsize=64)
def dcnv3(spec: DCNv3Spec, *, gather: bool = False) -> tirx.PrimFunc:
    """Build the kernel that takes offset and mask as two tensors.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. Sizes that are ``None`` become variables, bound by the shape of ``x``. With
        ``spec.softmax`` the mask holds logits.
    gather : bool
        Copy the pixels of a point first, by a block ``patch``, and use the target's exponential:
        so GPUs load many channels at once.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(x, offset, mask, out)``, with the shapes of `DCNv3Spec`, unscheduled.
    """
    sizes = sizes_of(spec)
    n, h, w, ho, wo = sizes
    channels, offsets, masks = extents_of(spec)
    dtype = spec.dtype
    align = _alignment(dtype, gather=gather)
    body = blocks(spec, sizes, mask_start=0, stored=dtype, gather=gather, center_feature=False)

    @T.prim_func(s_tir=True)
    def dcnv3(x: T.handle, offset: T.handle, mask: T.handle, out: T.handle):
        X = T.match_buffer(x, (n, h, w, channels), dtype, align=align)
        Offset = T.match_buffer(offset, (n, ho, wo, offsets), dtype, align=align)
        Mask = T.match_buffer(mask, (n, ho, wo, masks), dtype, align=align)
        Out = T.match_buffer(out, (n, ho, wo, channels), dtype, align=align)
        body(X, Offset, Mask, Out)

    return _finish(dcnv3, "dcnv3", spec)


@functools.lru_cache(maxsize=64)
def dcnv3_packed(
    spec: DCNv3Spec,
    out_dtype: str | None = None,
    *,
    offset_dtype: str | None = None,
    gather: bool = False,
    center_feature: bool = False,
) -> tirx.PrimFunc:
    """Build the kernel that takes offsets and mask logits in one tensor.

    One matrix product can then produce both.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem; ``spec.softmax`` must be set.
    out_dtype : str, optional
        Another element type for ``out`` than the problem's.
    offset_dtype : str, optional
        Another element type for ``offset_mask``.
    gather : bool
        As in `dcnv3`.
    center_feature : bool
        Blend the result y with x: ``y * (1 - s) + x * s`` where s, by group, is the sigmoid of a
        logit. The outputs must be as many as the pixels of x.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of ``(x, offset_mask, out)``, unscheduled. ``offset_mask`` has the shape
        (N, Ho, Wo, `packed_channels`): the ``group*P*2`` offsets, then the ``group*P`` logits,
        with `center_feature` the ``group`` logits of s, then channels that are not read.

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
    sizes = sizes_of(spec)
    n, h, w, ho, wo = sizes
    channels, offsets, _ = extents_of(spec)
    packed = int64(packed_channels(spec, center_feature=center_feature))
    dtype = spec.dtype
    stored = out_dtype or dtype
    learned = offset_dtype or dtype
    align, out_align, learned_align = (
        _alignment(kind, gather=gather) for kind in (dtype, stored, learned)
    )
    body = blocks(
        spec,
        sizes,
        mask_start=int(offsets),
        stored=stored,
        gather=gather,
        center_feature=center_feature,
    )

    @T.prim_func(s_tir=True)
    def dcnv3_packed(x: T.handle, offset_mask: T.handle, out: T.handle):
        X = T.match_buffer(x, (n, h, w, channels), dtype, align=align)
        OffsetMask = T.match_buffer(offset_mask, (n, ho, wo, packed), learned, align=learned_align)
        Out = T.match_buffer(out, (n, ho, wo, channels), stored, align=out_align)
        body(X, OffsetMask, OffsetMask, Out)

    finished = _finish(dcnv3_packed, "dcnv3_packed", spec)
    return finished.with_attr(CENTER_ATTR, True) if center_feature else finished


def packed_channels(spec: DCNv3Spec, *, center_feature: bool = False) -> int:
    """Count the channels of the tensor that `dcnv3_packed` takes."""
    used = 3 * spec.group * spec.points + (spec.group if center_feature else 0)
    return -(-used // PACKED_MULTIPLE) * PACKED_MULTIPLE


def gathering(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Build a kernel of this module anew, with the block ``patch``."""
    if str(func.attrs[KERNEL_ATTR]) == "dcnv3":
        return dcnv3(spec_of(func), gather=True)
    return packed_anew(func, gather=True)


def name_of(func: tirx.PrimFunc) -> str:
    """Return what a kernel of this module is called in a model."""
    kernel = str(func.attrs[KERNEL_ATTR])
    return f"{kernel}_center_feature" if CENTER_ATTR in func.attrs else kernel


def packed_anew(
    func: tirx.PrimFunc,
    *,
    x_dtype: str | None = None,
    offset_dtype: str | None = None,
    out_dtype: str | None = None,
    gather: bool = False,
) -> tirx.PrimFunc:
    """Build a kernel of `dcnv3_packed` anew; element types that are not given stay."""
    x, offset_mask, out = (str(param.dtype) for param in func.params)
    return dcnv3_packed(
        dataclasses.replace(spec_of(func), dtype=x_dtype or x),
        out_dtype or out,
        offset_dtype=offset_dtype or offset_mask,
        gather=gather,
        center_feature=CENTER_ATTR in func.attrs,
    )


def spec_of(func: tirx.PrimFunc) -> DCNv3Spec:
    """Return the problem that a kernel of this module was built for."""
    return DCNv3Spec.from_json(json.loads(str(func.attrs[SPEC_ATTR])))


def _alignment(dtype: str, *, gather: bool) -> int:
    """Return the multiple of bytes where a tensor begins.

    TVM would assume 64, and crash on an array of NumPy or a slice of one. GPUs get vectors, from
    tensors that are aligned for them, into copies in registers that TVM aligns like the tensors.
    """
    return gpu.VECTOR_BYTES if gather else DTYPE_BYTES[dtype]


def _finish(func: tirx.PrimFunc, name: str, spec: DCNv3Spec) -> tirx.PrimFunc:
    problem = json.dumps(spec.to_json())
    return func.with_attr(
        {"global_symbol": name, "tirx.noalias": True, KERNEL_ATTR: name, SPEC_ATTR: problem}
    )
