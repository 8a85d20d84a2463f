"""Fuse the softmax into DCNv3, and merge the projections to offset and mask.

The pass matches ``dcnv3(x, linear(y), softmax(linear(y)))``. The softmax over the points becomes
part of DCNv3, and the two projections of y become one matmul, whose result the packed DCNv3 reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tvm import relax

from dcnv3_tvm.op import relax_op, tensorir
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.op.relax_packed_op import dcnv3_packed
from dcnv3_tvm.transform.ir import Program, Rebuilder, dimensions, static_shape
from dcnv3_tvm.transform.lazy_array import LazyArray


def fuse_sampling(program: Program) -> Program:
    """Fuse the softmax into every DCNv3, and merge its projections."""
    return program.rebuilt(_fuse)


class Projection(NamedTuple):
    """``source @ weight + bias`` with constant weight and bias."""

    source: relax.Expr
    parameters: tuple[relax.Expr, relax.Expr]
    arrays: tuple[LazyArray, LazyArray]


def _fuse(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    if not relax_op.is_dcnv3(call):
        return None
    params = params_of(call)
    x, offset, mask = call.args
    if not params.softmax:
        logits = _logits(rebuilder, mask, params.points)
        if logits is None:
            return None
        mask = logits
        params = dataclasses.replace(params, softmax=True)
    fused = relax_op.dcnv3(x, offset, mask, **params.keywords())
    packed = _packed(rebuilder, var, fused)
    return rebuilder.emit(fused, like=var) if packed is None else packed


def _logits(rebuilder: Rebuilder, mask: relax.Expr, points: int) -> relax.Expr | None:
    """Return the logits if the mask is their softmax over the points, else None."""
    last = rebuilder.call(mask, "relax.reshape", only_use=True)
    if last is None:
        return None
    softmax = rebuilder.call(last.args[0], "relax.nn.softmax", only_use=True)
    if softmax is None:
        return None
    grouped = softmax.args[0]
    rank = grouped.ty.ndim
    if int(softmax.attrs.axis) % rank != rank - 1 or dimensions(grouped)[-1] != points:
        return None
    first = rebuilder.call(grouped, "relax.reshape", only_use=True)
    if first is None or first.args[0].ty != mask.ty:
        return None
    return first.args[0]


def _packed(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    """Return the packed form of a call on logits if its projections can be merged, else None."""
    x, offset, mask = call.args
    first, second = projection(rebuilder, offset), projection(rebuilder, mask)
    if first is None or second is None or not first.source.same_as(second.source):
        return None
    params = params_of(call)
    offset_mask = emit_merged(rebuilder, (first, second), tensorir.packed_channels(params))
    return rebuilder.emit(dcnv3_packed(x, offset_mask, params), like=var)


def projection(rebuilder: Rebuilder, tensor: relax.Expr) -> Projection | None:
    """Match a projection that is read once; None for other tensors."""
    total = rebuilder.call(tensor, "relax.add", only_use=True)
    if total is None or static_shape(total.args[1]) is None:
        return None
    matmul = rebuilder.call(total.args[0], "relax.matmul", only_use=True)
    if matmul is None:
        return None
    weight, bias = (rebuilder.array(argument) for argument in (matmul.args[1], total.args[1]))
    if weight is None or bias is None or weight.ndim != 2 or bias.ndim != 1:
        return None
    return Projection(matmul.args[0], (matmul.args[1], total.args[1]), (weight, bias))


def emit_merged(
    rebuilder: Rebuilder, projections: Sequence[Projection], channels: int
) -> relax.Var:
    """Emit one projection for several of a tensor, zero-padded to `channels` outputs."""

    def merged(index: int) -> relax.Var:
        arrays = [each.arrays[index] for each in projections]
        shape = (*arrays[0].shape[:-1], channels)
        array = LazyArray(_concatenate_and_pad, *arrays, shape=shape, channels=channels)
        return rebuilder.weight(array, projections[0].parameters[index], "merged")

    matmul = rebuilder.emit(relax.op.matmul(projections[0].source, merged(0)))
    return rebuilder.emit(relax.op.add(matmul, merged(1)))


def _concatenate_and_pad(*arrays: np.ndarray, channels: int) -> np.ndarray:
    array = np.concatenate(arrays, axis=-1)
    padding = channels - array.shape[-1]
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])
