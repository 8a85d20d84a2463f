"""ONNX graphs with one DCNv3, for tests of the importer and the exporter."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnx_ir.tape import Tape

from dcnv3_tvm.frontend.onnx import dcnv3_node
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

Array = npt.NDArray[Any]


def dcnv3_graph(
    params: DCNv3Params,
    *,
    rng: np.random.Generator,
    size: tuple[int, int] = (7, 9),
    channels: int = 8,
    batch: int | str = 2,
    linear: bool = False,
) -> ir.Model:
    """Build a graph of x, offset and mask; with `linear`, of x alone, which gives the others.

    Then offset and mask are linear in x, and the mask has a softmax, as in DCNv3's module.
    """
    height, width = size
    out = [params.output_extent(extent, axis) for axis, extent in enumerate(size)]
    tape = Tape()
    shapes = {"x": (batch, height, width, channels)}
    if not linear:
        shapes["offset"] = (batch, *out, params.offset_channels)
        shapes["mask"] = (batch, *out, params.mask_channels)
    inputs = [ir.val(name, dtype=ir.DataType.FLOAT, shape=shape) for name, shape in shapes.items()]

    def constant(array: Array, name: str) -> ir.Value:
        return tape.initializer(ir.tensor(array, name=name), name)

    def project(source: ir.Value, name: str, features: int, scale: float) -> ir.Value:
        weight = (scale * rng.standard_normal((channels, features))).astype("float32")
        bias = (scale * rng.standard_normal(features)).astype("float32")
        product = tape.op("MatMul", [source, constant(weight, f"{name}.weight")])
        return tape.op("Add", [product, constant(bias, f"{name}.bias")])

    if linear:
        offset = project(inputs[0], "offset", params.offset_channels, 1.5)
        logits = project(inputs[0], "mask", params.mask_channels, 1.0)
        grouped = constant(np.array([0, *out, params.group, params.points]), "grouped")
        flat = constant(np.array([0, *out, params.mask_channels]), "flat")
        softmax = tape.op("Softmax", [tape.op("Reshape", [logits, grouped])], {"axis": -1})
        arguments = [inputs[0], offset, tape.op("Reshape", [softmax, flat])]
    else:
        arguments = inputs
    y = dcnv3_node.emit(tape, *arguments, params)
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape([batch, *out, channels])
    graph = ir.Graph(
        inputs,
        [y],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 20, dcnv3_node.DOMAIN: dcnv3_node.VERSION},
        name="one_dcnv3",
    )
    model = ir.Model(graph, ir_version=10)
    ShapeInferencePass()(model)
    return model


def random_inputs(model: ir.Model, rng: np.random.Generator) -> dict[str, Array]:
    """Make inputs; offsets reach beyond the image."""
    scales = {"offset": 4.0}
    return {
        str(value.name): (
            scales.get(str(value.name), 1.0)
            * rng.standard_normal(
                [size if isinstance(size, int) else 2 for size in value.shape or ()]
            )
        ).astype("float32")
        for value in model.graph.inputs
    }


def expected(model: ir.Model, params: DCNv3Params, inputs: dict[str, Array]) -> Array:
    """Compute the graph's result in float64."""
    x = inputs["x"].astype("float64")
    if "offset" in inputs:
        offset, mask = inputs["offset"], inputs["mask"]
    else:
        weights = {name: np.asarray(v.const_value) for name, v in model.graph.initializers.items()}
        offset = x @ weights["offset.weight"] + weights["offset.bias"]
        logits = x @ weights["mask.weight"] + weights["mask.bias"]
        grouped = np.exp(logits.reshape(*logits.shape[:3], params.group, params.points))
        mask = (grouped / grouped.sum(-1, keepdims=True)).reshape(logits.shape)
    return dcnv3_reference(x, offset, mask, DCNv3Spec.of(x.shape, **params.keywords()))
