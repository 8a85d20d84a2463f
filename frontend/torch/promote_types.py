"""Cast the operands of an exported program to the type in which PyTorch computes.

TVM's converters compute in the type of the first tensor: ``torch.arange(n) / n`` in integers. They
fail for a tensor and a dynamic size, which becomes a tensor here.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

_RESULT_TYPED: Final = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "floor_divide", "fmod", "remainder", "pow"),
        *("atan2", "clamp", "clamp_max", "clamp_min", "logaddexp", "maximum", "minimum"),
        *("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"),
        *("cat", "stack", "where"),
    }
)
"""Operators that compute in the type of their result."""

_COMPARISONS: Final = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
"""Operators that compute in the common type of their operands."""


_LOGICAL: Final = {
    "add": torch.ops.aten.logical_or.default,
    "mul": torch.ops.aten.logical_and.default,
}
"""What operators do to booleans, where TVM's kernels fail."""


def promote_types(program: ExportedProgram) -> None:
    """Insert a cast before each operator that computes in another type than an operand's."""
    for node in list(program.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target.overloadpacket.__name__
        if name in _LOGICAL and _is_of_booleans(node):
            node.target, node.args = _LOGICAL[name], node.args[:2]
            continue
        if name in _RESULT_TYPED or _is_floating_function(node):
            dtype = node.meta["val"].dtype
        elif name in _COMPARISONS:
            dtype = torch.result_type(*map_arg(node.args, lambda each: each.meta["val"]))
            dtype = torch.int8 if dtype == torch.bool else dtype  # TVM cannot compare booleans.
        else:
            continue
        kept = node.args[:1] if name == "where" else ()
        node.args = (*kept, *_cast(node, node.args[len(kept) :], dtype))
        node.kwargs = _cast(node, node.kwargs, dtype)


def _is_of_booleans(node: Node) -> bool:
    operands = [each.meta["val"] for each in node.args[:2] if isinstance(each, Node)]
    return len(operands) == 2 and all(
        isinstance(each, Tensor) and each.dtype == torch.bool for each in operands
    )


def _is_floating_function(node: Node) -> bool:
    """Whether a node is a function of one tensor, such as exp, with a floating-point result."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1:
        return False
    value = node.meta.get("val")
    is_floating = isinstance(value, Tensor) and value.dtype.is_floating_point
    return is_floating and torch.Tag.pointwise in node.target.tags


def _cast(node: Node, operands: Any, dtype: torch.dtype) -> Any:
    """Return the operands with those of another type replaced by casts."""

    def cast(operand: Node) -> Node:
        value = operand.meta["val"]
        if isinstance(value, torch.SymInt):
            function = torch.ops.aten.scalar_tensor.default
            value = torch.empty((), dtype=dtype, device="meta")
        elif isinstance(value, Tensor) and value.dtype != dtype:
            function = torch.ops.aten.to.dtype
            value = value.to(dtype)
        else:
            return operand
        with node.graph.inserting_before(node):
            result = node.graph.call_function(function, (operand,), {"dtype": dtype})
        result.meta = {**node.meta, "val": value}
        return result

    return map_arg(operands, cast)
