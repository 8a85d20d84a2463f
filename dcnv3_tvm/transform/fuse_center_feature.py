"""Fuse center-feature scaling into DCNv3.

InternImage H and G compute ``y * (1 - s) + x * s`` after ``y = dcnv3(x, ...)``, where s is the
sigmoid of a projection to one number for each group, repeated for the group's channels. The kernel
reads x anyway, and the projection is merged with those to offset and mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import tvm_ffi
from tvm import relax

from dcnv3_tvm.op import relax_packed_op, tensorir
from dcnv3_tvm.op.relax_call import params_of, spec_of
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.transform.fuse_sampling import Projection, emit_merged, projection
from dcnv3_tvm.transform.ir import Program, Rebuilder, dimensions
from dcnv3_tvm.transform.lazy_array import LazyArray

_GATE: Final = (
    ("relax.reshape",),
    ("relax.broadcast_to", "relax.tile"),
    ("relax.expand_dims", "relax.reshape"),
    ("relax.sigmoid",),
)
"""Operators from the gate back to its logits."""


def fuse_center_feature(program: Program) -> Program:
    """Fuse the blend after every packed DCNv3 into it."""
    return program.rebuilt(_fuse)


def _fuse(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    if getattr(call.op, "name", "") != "relax.add":
        return None
    for deformed, plain in _both_orders(call):
        for sampled, complement in _factors(rebuilder, deformed):
            for source, gate in _factors(rebuilder, plain):
                if _is_complement(rebuilder, complement, gate):
                    blended = _blended(rebuilder, var, sampled, source, gate)
                    if blended is not None:
                        return blended
    return None


def _both_orders(call: relax.Call) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    first, second = call.args
    yield first, second
    yield second, first


def _factors(rebuilder: Rebuilder, expr: relax.Expr) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    multiply = rebuilder.call(expr, "relax.multiply", only_use=True)
    if multiply is not None:
        yield from _both_orders(multiply)


def _is_complement(rebuilder: Rebuilder, complement: relax.Expr, gate: relax.Expr) -> bool:
    """Whether an expression is ``1 - gate``."""
    difference = rebuilder.call(complement, "relax.subtract")
    if difference is None or not difference.args[1].same_as(gate):
        return False
    one = rebuilder.array(difference.args[0])
    return one is not None and one.size == 1 and float(np.asarray(one).reshape(())) == 1


def _blended(
    rebuilder: Rebuilder,
    var: relax.Var,
    sampled: relax.Expr,
    source: relax.Expr,
    gate: relax.Expr,
) -> relax.Var | None:
    """Emit the DCNv3 that blends, if `sampled` is a packed DCNv3 of `source`."""
    sampling = rebuilder.call(sampled, relax_packed_op.OP_NAME, only_use=True)
    if sampling is None:
        return None
    x, offset_mask = sampling.args
    if not x.same_as(source) or any(not _same_type(sampled, other) for other in (x, gate)):
        return None
    spec = spec_of(sampling)
    logits, made = _logits(rebuilder, gate, spec), projection(rebuilder, offset_mask)
    if logits is None or made is None or not logits.source.same_as(made.source):
        return None
    used = spec.offset_channels + spec.mask_channels
    weight, bias = (
        LazyArray(_first_channels, array, shape=(*array.shape[:-1], used), count=used)
        for array in made.arrays
    )
    channels = tensorir.packed_channels(spec, center_feature=True)
    parts = (made._replace(arrays=(weight, bias)), logits)
    packed = emit_merged(rebuilder, parts, channels)
    params = params_of(sampling)
    call = relax_packed_op.dcnv3_packed(x, packed, params, center_feature=True)
    return rebuilder.emit(call, like=var)


def _first_channels(array: np.ndarray, count: int) -> np.ndarray:
    return array[..., :count]


def _same_type(first: relax.Expr, second: relax.Expr) -> bool:
    return bool(tvm_ffi.structural_equal(first.ty, second.ty))


def _logits(rebuilder: Rebuilder, gate: relax.Expr, spec: DCNv3Spec) -> Projection | None:
    """Return the projection that the gate is the sigmoid of, repeated for a group's channels."""
    shapes = []
    for operators in _GATE:
        call = rebuilder.call(gate, *operators)
        if call is None:
            return None
        gate = call.args[0]
        shapes.append(dimensions(gate))
    repeated, expanded, logits, _ = shapes
    if repeated[-2:] != (spec.group, spec.group_channels) or expanded[-2:] != (spec.group, 1):
        return None
    return projection(rebuilder, gate) if logits[-1] == spec.group else None
