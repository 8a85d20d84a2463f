"""Evaluate a part of an ONNX graph in NumPy, and compare it with DCNv3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx.graph import Array
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

_BATCH: Final = 2
"""Value of a dynamic batch."""


class Subgraph:
    """The nodes between some values and a result.

    Parameters
    ----------
    inputs : sequence of Value
        x, offset and mask.
    nodes : sequence of Node
        In order.
    result : Value
        What they compute.
    """

    def __init__(
        self, inputs: Sequence[ir.Value], nodes: Sequence[ir.Node], result: ir.Value
    ) -> None:
        self.inputs = tuple(inputs)
        self.shapes = [_concrete(value) for value in inputs]
        self._nodes = nodes
        self._result = result

    @classmethod
    def between(cls, inputs: Sequence[ir.Value], result: ir.Value) -> Subgraph | None:
        """Find the nodes; None if they need another value that is not constant."""
        graph = result.graph
        needed = _needed(inputs, result)
        if needed is None or graph is None:
            return None
        return cls(inputs, [node for node in graph if node in needed], result)

    def run(self, arrays: Sequence[Array], output: ir.Value | None = None) -> Array:
        """Compute the result, or a value on the way to it."""
        output = output or self._result
        needed = _needed(self.inputs, output) or set()
        # A model of its own, on copies of the nodes.
        values: dict[ir.Value, ir.Value] = {}
        constants: list[ir.Value] = []

        def copied(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in values:
                return None if value is None else values[value]
            node = value.producer()
            tensor = None
            if node is not None and node.op_type == "Shape":
                tensor = ir.tensor(_shape_of(node))
            elif node is None and value.const_value is not None:
                tensor = ir.tensor(value.const_value.numpy())  # it may be in another file
            values[value] = ir.val(f"v{len(values)}", const_value=tensor, dtype=value.dtype)
            if tensor is not None:
                constants.append(values[value])
            return values[value]

        inputs = [copied(value) for value in self.inputs]
        for value, shape in zip(inputs, self.shapes, strict=True):
            assert value is not None
            value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        nodes = [
            ir.Node(
                node.domain,
                node.op_type,
                [copied(value) for value in node.inputs],
                list(node.attributes.values()),
                outputs=[copied(value) for value in node.outputs],
            )
            for node in self._nodes
            if node in needed and node.op_type != "Shape"
        ]
        graph = self._nodes[0].graph
        assert graph is not None
        model = ir.Model(
            ir.Graph(
                inputs,
                [values[output]],
                nodes=nodes,
                initializers=constants,
                opset_imports=dict(graph.opset_imports),
                name="subgraph",
            ),
            ir_version=10,
        )
        values[output].type = ir.TensorType(ir.DataType.FLOAT)
        values[output].shape = None
        evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[GridSample])
        feeds = {
            values[value].name: array for value, array in zip(self.inputs, arrays, strict=True)
        }
        (array,) = evaluator.run(None, feeds)
        return np.asarray(array)

    def error_of(self, params: DCNv3Params, scale: Array, shift: Array) -> float:
        """Compare with the operator on random inputs, with offsets that leave the image.

        Parameters
        ----------
        params : DCNv3Params
            The operator's.
        scale, shift : ndarray
            Of the operator's offset as a function of this one.

        Returns
        -------
        float
            Max abs error relative to max|reference|; infinite if the shapes differ.
        """
        rng = np.random.default_rng(0)
        x, offset, mask = (rng.standard_normal(shape).astype("float32") for shape in self.shapes)
        offset *= rng.choice([1.0, 4.0, max(self.shapes[0][1:3])], offset.shape).astype("float32")
        offset = (offset.reshape(*offset.shape[:3], -1) / scale).astype("float32")
        moved, weights = offset * scale + shift, mask.reshape(*mask.shape[:3], -1)
        try:
            spec = DCNv3Spec.of(x.shape, **params.keywords())
            expected = dcnv3_reference(x, moved, weights, spec)
        except InvalidArgumentError:
            return math.inf
        got = self.run((x, offset.reshape(self.shapes[1]), mask))
        if got.shape != expected.shape:
            return math.inf
        return float(np.abs(got - expected).max() / np.abs(expected).max())


def _needed(inputs: Sequence[ir.Value], result: ir.Value) -> set[ir.Node] | None:
    """Find the nodes from `inputs` to a value; None if they read others that are not constant."""
    needed: set[ir.Node] = set()
    stack = [result]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in inputs or node in needed:
            continue
        if node is None:
            if value.const_value is None:
                return None
            continue
        needed.add(node)
        if node.op_type != "Shape":
            stack += [source for source in node.inputs if source is not None]
    return needed


def _shape_of(node: ir.Node) -> Array:
    """Compute a ``Shape`` node, with a number for a dynamic batch."""
    value = node.inputs[0]
    assert value is not None
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    part = slice(start.value if start else 0, end.value if end else None)
    return np.array(_concrete(value)[part], "int64")


def _concrete(value: ir.Value) -> tuple[int, ...]:
    """Return a shape with numbers for dynamic sizes."""
    return tuple(
        size if isinstance(size, int) else _BATCH if axis == 0 else 16
        for axis, size in enumerate(value.shape or ())
    )


class GridSample(OpRun):
    """Bilinear sampling in NumPy; that of the reference evaluator is a loop in Python."""

    op_domain = ""

    def _run(  # type: ignore[no-untyped-def]
        self, x, grid, align_corners=None, mode=None, padding_mode=None
    ):
        del mode, padding_mode  # checked by `recognize`
        size = np.array([x.shape[3], x.shape[2]], x.dtype)
        pixels = (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2
        batch = np.arange(len(x)).reshape(-1, 1, 1)
        return (_bilinear(x, batch, pixels[..., 1], pixels[..., 0]),)


def _bilinear(maps: Array, batch: Array, y: Array, x: Array) -> Array:
    """Sample (N, C, H, W) at (N, h, w) positions; zero outside."""
    height, width = maps.shape[2:]
    top, left = np.floor(y), np.floor(x)
    result: Any = 0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at_row = np.clip(row, 0, height - 1).astype("int64")
            at_column = np.clip(column, 0, width - 1).astype("int64")
            # (N, h, w, C) because the advanced indices are apart.
            corner = maps[batch, :, at_row, at_column]
            result = result + corner * (inside * weight_y * weight_x)[..., None]
    array: Array = np.moveaxis(np.asarray(result, maps.dtype), -1, 1)
    return array
