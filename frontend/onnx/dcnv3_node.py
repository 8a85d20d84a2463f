"""DCNv3 as one node of an ONNX graph: this library's ``dcnv3_tvm::DCNv3``.

Every form of the operator is converted from this node (export) or to it (import). Its inputs are
those of `dcnv3_tvm.dcnv3`, its attributes the fields of `DCNv3Params`.
"""

from __future__ import annotations

from typing import Any, Final

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema
from onnx_ir.tape import Tape

from dcnv3_tvm.spec import PARAMETERS, DCNv3Params

DOMAIN: Final = "dcnv3_tvm"
OP_TYPE: Final = "DCNv3"
VERSION: Final = 1
_RANK: Final = 4

_ATTRIBUTE_TYPES: Final = {
    int: OpSchema.AttrType.INT,
    bool: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    tuple: OpSchema.AttrType.INTS,
}


def schema() -> OpSchema:
    """Describe the node for ONNX's tools."""
    parameter = OpSchema.FormalParameter
    defaults = dict(DCNv3Params(group=1).keywords())
    described = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc="DCNv3: x (N, H, W, C), offset (N, Ho, Wo, group*P*2), mask (N, Ho, Wo, group*P).",
        inputs=[parameter(name, "T") for name in ("x", "offset", "mask")],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)"], "")],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTE_TYPES[type(defaults[name])]) for name in PARAMETERS
        ],
    )
    described.set_type_and_shape_inference_function(_infer_shape)
    return described


def _infer_shape(context: Any) -> None:
    """Infer the result's type: batch and channels of x, height and width of offset."""
    x, offset = (context.get_input_type(index) for index in range(2))
    result = onnx.TypeProto()
    result.CopyFrom(x)
    sizes = result.tensor_type.shape.dim
    moved = offset.tensor_type.shape.dim
    if len(sizes) == len(moved) == _RANK:
        for axis in (1, 2):
            sizes[axis].CopyFrom(moved[axis])
    else:
        result.tensor_type.ClearField("shape")
    context.set_output_type(0, result)


def attributes_of(params: DCNv3Params) -> dict[str, Any]:
    """Return the node's attributes as plain values."""
    return {
        name: int(value) if isinstance(value, bool) else value
        for name, value in params.keywords().items()
    }


def is_dcnv3(node: ir.Node) -> bool:
    """Whether a node is this library's."""
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def params_of(node: ir.Node) -> DCNv3Params:
    """Read the parameters of a node.

    Raises
    ------
    InvalidArgumentError
        If an attribute is out of range, of the wrong type or unknown.
    """
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    for name in ("remove_center", "softmax"):
        if values.get(name) in (0, 1):
            values[name] = bool(values[name])
    return DCNv3Params(**values)


def emit(
    tape: Tape,
    x: ir.Value | None,
    offset: ir.Value | None,
    mask: ir.Value | None,
    params: DCNv3Params,
) -> ir.Value:
    """Add a node to a tape."""
    inputs = [x, offset, mask]
    attributes = attributes_of(params)
    return tape.op(OP_TYPE, inputs, attributes, domain=DOMAIN, version=VERSION)


def _register() -> None:
    # ONNX's registry of schemas outlives a reload of this module.
    if not onnx.defs.has(OP_TYPE, DOMAIN):
        onnx.defs.register_schema(schema())


_register()
