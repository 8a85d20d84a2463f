"""Channels last from the image to the outputs, with the transposes folded away."""

from __future__ import annotations

from typing import Final

from tvm import relax

from dcnv3_tvm.transform.ir import Program, Rebuilder, with_attributes
from dcnv3_tvm.transform.sink_transposes import sink_transposes

_TO_CHANNELS_LAST: Final = [0, 2, 3, 1]
_TO_CHANNELS_FIRST: Final = [0, 3, 1, 2]


def convert_layout(program: Program) -> Program:
    """Turn the convolutions to NHWC, and remove the transposes that this leaves over.

    TVM's pass ConvertLayout is not used: it changes every operator that it takes to know, and
    fails on several of them (stack, attention, slices of open sizes, sums of different ranks).
    """
    return sink_transposes(program.rebuilt(_turn_convolution))


def _turn_convolution(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    if getattr(call.op, "name", "") != "relax.nn.conv2d":
        return None
    if (str(call.attrs.data_layout), str(call.attrs.kernel_layout)) != ("NCHW", "OIHW"):
        return None
    turned = [
        rebuilder.emit(relax.op.permute_dims(argument, _TO_CHANNELS_LAST)) for argument in call.args
    ]
    result = rebuilder.emit(
        with_attributes(call, turned, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")
    )
    return rebuilder.emit(relax.op.permute_dims(result, _TO_CHANNELS_FIRST), like=var)
