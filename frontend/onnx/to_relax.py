"""Convert an ONNX graph with `dcnv3_node` nodes to a Relax function, by TVM's importer."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.onnx import dcnv3_node
from dcnv3_tvm.frontend.onnx.graph import Array
from dcnv3_tvm.op import relax_op
from dcnv3_tvm.transform.ir import dimensions, element_type

_CONSTANT_OPERANDS: Final = frozenset(
    {"Clip", "ConstantOfShape", "Dropout", "OneHot", "Pad", "Range", "Resize", "Upsample"}
)
"""Operators whose converters need the values of their floating-point constants."""

_ROUNDING: Final = 1e-6
"""Relative error of a scale in float32."""


def to_relax(model: ir.Model) -> tuple[tvm.IRModule, dict[str, Array]]:
    """Convert to a function ``main`` of the graph's inputs, followed by its weights.

    Parameters
    ----------
    model : onnx_ir.Model
        In float32, with shapes. Its weights become inputs.

    Returns
    -------
    module : tvm.IRModule
        Holds kernels too, which TVM's importer emits for some operators.
    weights : dict of str to ndarray
        By name, in the order of the function's parameters.

    Raises
    ------
    ModelImportError
        If an operator is not supported, or TVM cannot convert one.
    """
    graph = model.graph
    _check_operators(graph)
    # TVM copies initializers, and ONNX's format holds 2 GB at most, so it sees none.
    weights: dict[str, Array] = {}
    for name, value in list(graph.initializers.items()):
        if _is_weight(value):
            assert value.const_value is not None
            weights[name] = np.asarray(value.const_value.numpy())
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
        elif value.const_value is not None:  # read, as it may be in another file
            value.const_value = ir.tensor(value.const_value.numpy(), name=name)
    importer = _Importer(None, "float32", sanitize=False)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            module = importer.from_onnx(ir.to_proto(model).graph, graph.opset_imports[""])
    except ModelImportError:
        raise
    except Exception as error:  # TVM's converters raise assertions, KeyError, ValueError, ...
        raise ModelImportError(
            "TVM cannot convert the ONNX graph",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="Give fixed shapes (shapes={'input': (1, 3, 224, 224)}) if sizes are dynamic.",
        ) from error
    # Converters emit shapes that nothing reads.
    return relax.transform.DeadCodeElimination()(module), weights


class _Importer(ONNXGraphImporter):
    """TVM's importer, which knows the node of DCNv3 too."""

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """`_check_operators` has."""

    def _parse_attr(self, attributes: Any) -> dict[str, Any]:
        values: dict[str, Any] = super()._parse_attr(attributes)
        # ONNX stores float32: 1e-6 comes back as 9.99999997e-07.
        return {
            name: float(str(np.float32(value))) if isinstance(value, float) else value
            for name, value in values.items()
        }

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        if op_name == "GlobalAveragePool" or (
            op_name == "ReduceMean" and _is_over_pixels(inputs, attrs)
        ):
            # The operator that a PyTorch model has.
            return self.bb.emit(relax.op.nn.adaptive_avg_pool2d(inputs[0], (1, 1)))
        if op_name == "Tile" and isinstance(inputs[1], GenericConst):
            # As an operator, which `fuse_center_feature` matches, and not as a kernel.
            return self.bb.emit(relax.op.tile(inputs[0], inputs[1].value.numpy().tolist()))
        if op_name == "Pow" and not element_type(inputs[0]).startswith("float"):
            # TVM has no kernel for powers of integers. Those below 2^53 are exact in float64.
            base, exponent = (relax.op.astype(each, "float64") for each in inputs)
            power = relax.op.round(relax.op.power(base, exponent))
            return self.bb.emit(relax.op.astype(power, element_type(inputs[0])))
        if op_name == "Resize":
            _check_resize(inputs, attrs)
        if op_name != dcnv3_node.OP_TYPE:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        del attrs["tvm_custom"]
        for name in ("remove_center", "softmax"):
            attrs[name] = bool(attrs[name])
        return self.bb.emit(relax_op.dcnv3(*inputs, **attrs))


def _check_resize(inputs: Any, attrs: dict[str, Any]) -> None:
    """Raise an error for what TVM's converter ignores: antialiasing, and the scale.

    TVM derives the scale from the two sizes. ONNX takes the given one, which differs where the
    output size was rounded.
    """
    mode = attrs.get("coordinate_transformation_mode", b"half_pixel")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    scales = inputs[2] if len(inputs) > 2 else None
    problem = "antialias=1" if attrs.get("antialias") else ""
    if isinstance(scales, GenericConst) and mode != "align_corners":
        for size, scale in zip(dimensions(inputs[0]), scales.value.numpy().tolist(), strict=False):
            exact = size * scale if isinstance(size, int) else scale
            if abs(exact - round(exact)) > _ROUNDING * exact:
                problem = f"size {size} by scale {scale:g}, which gives no whole number of pixels"
    if problem:
        raise ModelImportError(
            "a Resize is not supported",
            got=problem,
            hint="Export it with an output size or a whole scale, and without antialiasing.",
        )


def _is_over_pixels(inputs: Any, attrs: dict[str, Any]) -> bool:
    """Whether a ReduceMean takes the mean of each channel of an NCHW map, and keeps the axes."""
    axes = inputs[1] if len(inputs) > 1 else None
    if (
        inputs[0].ty.ndim != 4
        or not isinstance(axes, GenericConst)
        or attrs.get("keepdims", 1) != 1
    ):
        return False
    return sorted(int(axis) % 4 for axis in axes.value.numpy()) == [2, 3]


def _check_operators(graph: ir.Graph) -> None:
    known = _get_convert_map().keys() | {"Constant", "If"}
    unknown = sorted(
        {
            f"{node.domain + '::' if node.domain else ''}{node.op_type}"
            for node in graph
            if not dcnv3_node.is_dcnv3(node)
            and (node.domain not in ("", "ai.onnx") or node.op_type not in known)
        }
    )
    if unknown:
        raise ModelImportError(
            "the ONNX graph has operators that are not supported", got=", ".join(unknown)
        )


def _is_weight(value: ir.Value) -> bool:
    return (
        value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        and value.const_value is not None
        and len(value.const_value.shape) > 0
        and not any(use.node.op_type in _CONSTANT_OPERANDS for use in value.uses())
    )
