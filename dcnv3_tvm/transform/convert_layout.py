"""Convert convolutions to NHWC, and cancel the transposes around them."""

from __future__ import annotations

from typing import Final

from tvm import relax

from dcnv3_tvm.transform.ir import Program, Rebuilder, with_attributes
from dcnv3_tvm.transform.sink_transposes import sink_transposes

_TO_CHANNELS_LAST: Final = [0, 2, 3, 1]
_TO_CHANNELS_FIRST: Final = [0, 3, 1, 2]


def convert_layout(program: Program) -> Program:
    """Convert every NCHW convolution to NHWC, between transposes, and sink these.

    TVM's pass ConvertLayout is not used: it converts every operator with a layout rule, and fails
    on several of these (stack, attention, slices of symbolic sizes, sums of different ranks).
    """
    return sink_transposes(program.rebuilt(_convert_convolution))


def _convert_convolution(
    rebuilder: Rebuilder, var: relax.Var, call: relax.Call
) -> relax.Var | None:
    if getattr(call.op, "name", "") != "relax.nn.conv2d":
        return None
    if (str(call.attrs.data_layout), str(call.attrs.kernel_layout)) != ("NCHW", "OIHW"):
        return None
    transposed = [
        rebuilder.emit(relax.op.permute_dims(argument, _TO_CHANNELS_LAST)) for argument in call.args
    ]
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}
    result = rebuilder.emit(with_attributes(call, transposed, **layouts))
    return rebuilder.emit(relax.op.permute_dims(result, _TO_CHANNELS_FIRST), like=var)
