"""Fuse what exporters decompose: GELU, LayerNorm, a flattening written as strides.

An ``Expand`` to the shape that a tensor has is removed.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from dcnv3_tvm.frontend.onnx.evaluate import Subgraph
from dcnv3_tvm.frontend.onnx.graph import (
    Replacement,
    constant_of,
    each_node,
    producer,
    remove_unused,
    replace_node,
)


def fuse(graph: ir.Graph) -> None:
    """Fuse every pattern of a graph."""
    for node in each_node(graph, lambda node: node.op_type == "Erf"):
        _fuse_gelu(node)
    for node in each_node(graph, lambda node: node.op_type == "Sqrt"):
        _fuse_layer_norm(node)
    for node in each_node(graph, lambda node: node.op_type == "Gather"):
        _fuse_flatten(node)
    for node in each_node(graph, lambda node: node.op_type == "Expand"):
        source, result = node.inputs[0], node.outputs[0]
        if (
            source is not None
            and None is not source.shape == result.shape
            and not result.is_graph_output()
        ):
            result.replace_all_uses_with(source)
    remove_unused(graph)


def _fuse_gelu(erf: ir.Node) -> None:
    """Match ``x/sqrt(2)``, erf, ``+ 1``, and the factors x and 0.5 in any order."""
    scaled = producer(erf.inputs[0], "Div", "Mul", only_use=True)
    if scaled is None:
        return
    x, factor = scaled.inputs[0], _scalar(scaled.inputs[1])
    expected = math.sqrt(2) if scaled.op_type == "Div" else math.sqrt(0.5)
    if x is None or factor is None or not math.isclose(factor, expected, rel_tol=1e-5):
        return
    plus_one = _reader(erf, "Add")
    if plus_one is None or _other_scalar(plus_one, erf.outputs[0]) != 1:
        return
    node = plus_one
    # Two multiplications: by x and by 0.5; either may be a product of its own.
    found = {"x": False, "half": False}
    for _ in range(2):
        reader = _reader(node, "Mul")
        if reader is None:
            return
        other = next((value for value in reader.inputs if value is not node.outputs[0]), None)
        inner = producer(other, "Mul", only_use=True)
        if other is x:
            found["x"] = True
        elif _scalar(other) == 0.5:
            found["half"] = True
        elif inner is not None and x in inner.inputs and _other_scalar(inner, x) == 0.5:
            found = {"x": True, "half": True}
        else:
            return
        node = reader
        if all(found.values()):
            break
    if not all(found.values()):
        return
    tape = Replacement(node)
    replace_node(node, tape.op("Gelu", [x], version=20), tape)


def _fuse_layer_norm(root: ir.Node) -> None:
    """Match ``(x - mean) / sqrt(mean((x - mean)**2) + epsilon) * weight + bias``."""
    total = producer(root.inputs[0], "Add", only_use=True)
    if total is None:
        return
    for variance, constant in (tuple(total.inputs), tuple(reversed(total.inputs))):
        epsilon, mean = _scalar(constant), producer(variance, "ReduceMean", only_use=True)
        if epsilon is not None and mean is not None:
            break
    else:
        return
    square = producer(mean.inputs[0], "Pow", "Mul", only_use=True)
    if square is None or (square.op_type == "Pow" and _scalar(square.inputs[1]) != 2):
        return
    centered = square.inputs[0]
    if square.op_type == "Mul" and square.inputs[1] is not centered:
        return
    subtract = producer(centered, "Sub")
    divide = _reader(root, "Div")
    if subtract is None or divide is None or divide.inputs[0] is not centered:
        return
    x = subtract.inputs[0]
    average = producer(subtract.inputs[1], "ReduceMean")
    if average is None or average.inputs[0] is not x:
        return
    if not (_over_channels(mean) and _over_channels(average)):
        return
    scale = _reader(divide, "Mul")
    shift = None if scale is None else _reader(scale, "Add")
    if scale is None or shift is None:
        return
    weight, bias = (
        next((value for value in node.inputs if constant_of(value) is not None), None)
        for node in (scale, shift)
    )
    if weight is None or bias is None or len(weight.shape or ()) != 1 != len(bias.shape or ()):
        return
    tape = Replacement(shift)
    attributes = {"axis": -1, "epsilon": epsilon}
    output = tape.op("LayerNormalization", [x, weight, bias], attributes, version=17)
    replace_node(shift, output, tape)


def _fuse_flatten(gather: ir.Node) -> None:
    """Match a Gather from a flat tensor that takes all elements in order."""
    flat = producer(gather.inputs[0], "Reshape")
    indices, result = gather.inputs[1], gather.outputs[0]
    shape = None if flat is None else constant_of(flat.inputs[1])
    if flat is None or indices is None or shape is None or shape.tolist() != [-1]:
        return
    x = flat.inputs[0]
    if x is None or x.shape is None or result.shape is None or len(result.shape) < 2:
        return
    if (
        result.is_graph_output()
        or list(x.shape) != list(result.shape)
        or not all(isinstance(size, int) for size in list(x.shape)[1:])
    ):
        return
    places = constant_of(indices)
    if places is None:
        subgraph = Subgraph.between([x], indices)
        if subgraph is None:
            return
        places = subgraph.run([np.zeros(subgraph.shapes[0], "float32")])
    if places.shape[1:] == tuple(x.shape)[1:] and np.array_equal(
        places.reshape(-1), np.arange(places.size)
    ):
        result.replace_all_uses_with(x)


def _over_channels(node: ir.Node) -> bool:
    axes = node.attributes["axes"].value if "axes" in node.attributes else None
    if axes is None and len(node.inputs) > 1:
        array = constant_of(node.inputs[1])
        axes = None if array is None else array.tolist()
    keep = node.attributes.get("keepdims")
    return axes is not None and list(axes) == [-1] and (keep is None or keep.value == 1)


def _reader(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return the only reader of a node's result if it is of a type."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def _scalar(value: ir.Value | None) -> float | None:
    array = constant_of(value)
    return float(np.reshape(array, ())) if array is not None and array.size == 1 else None


def _other_scalar(node: ir.Node, value: ir.Value) -> float | None:
    return _scalar(next((other for other in node.inputs if other is not value), None))
