"""Reading and rewriting of ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

Array = npt.NDArray[Any]


class Replacement(Tape):
    """Nodes and constants that take the place of a node.

    Parameters
    ----------
    node : Node
        The node, after whose result the constants are named.
    """

    def __init__(self, node: ir.Node) -> None:
        super().__init__()
        self._prefix = f"{node.outputs[0].name}.constant"

    def constant(self, array: Any, dtype: npt.DTypeLike, name: str = "") -> ir.Value:
        """Add an initializer; without a name it is numbered."""
        name = name or f"{self._prefix}.{len(self.initializers)}"
        tensor = ir.tensor(np.ascontiguousarray(array, dtype), name=name)
        return self.initializer(tensor, name)

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Add a reshape; a size of zero is copied."""
        return self.op("Reshape", [value, self.constant(shape, "int64")])

    def channels_first(self, value: ir.Value) -> ir.Value:
        """Add a transpose from NHWC to NCHW."""
        return self.op("Transpose", [value], {"perm": (0, 3, 1, 2)})

    def channels_last(self, value: ir.Value) -> ir.Value:
        """Add a transpose from NCHW to NHWC."""
        return self.op("Transpose", [value], {"perm": (0, 2, 3, 1)})


def replace_node(node: ir.Node, output: ir.Value, replacement: Replacement) -> None:
    """Put a replacement in the place of a node with one output."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.outputs[0]
    output.shape, output.type = old.shape, old.type
    for initializer in replacement.initializers:
        while initializer.name in graph.initializers:
            initializer.name = f"{initializer.name}_"
        graph.register_initializer(initializer)
    graph.insert_before(node, replacement.nodes)
    name = old.name
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = name


def constant_of(value: ir.Value | None) -> Array | None:
    """Return the value of an initializer or a Constant node; None for others."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def producer(value: ir.Value | None, *op_types: str, only_use: bool = False) -> ir.Node | None:
    """Return the node that computes `value` if it is of one of the types.

    With `only_use`, only if the value is read once and no output, so that a reader may absorb it.
    """
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        return None
    assert value is not None
    if only_use and (len(value.uses()) != 1 or value.is_graph_output()):
        return None
    return node


def spatial_sizes(value: ir.Value) -> list[int]:
    """Return axes 1 and 2 for the shape of a reshape: numbers, or zero to copy a dynamic size."""
    shape = (0, 0, 0, 0) if value.shape is None else tuple(value.shape)
    return [size if isinstance(size, int) else 0 for size in shape[1:3]]


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that no output needs."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def each_node(graph: ir.Graph, matches: Callable[[ir.Node], bool]) -> list[ir.Node]:
    """List the nodes that match, so that they can be replaced in the loop."""
    return [node for node in graph if matches(node)]
