"""Remove regions of autocast, ``no_grad`` and ``enable_grad`` from exported programs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_REGION: Final = "wrap_with_set_grad_enabled"
"""A call of a subgraph; the arguments are the mode, the subgraph and its operands."""


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Make autocast do nothing in this thread.

    A model is imported in float32, and its type is chosen when it is compiled. An exported region
    would contain casts to the type of autocast, where the model casts one tensor to the type of
    another.
    """
    thread = threading.get_ident()
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def enter_elsewhere(self: torch.autocast) -> Any:
        return self if threading.get_ident() == thread else enter(self)

    def leave_elsewhere(self: torch.autocast, *error: Any) -> Any:
        return None if threading.get_ident() == thread else leave(self, *error)

    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        torch.autocast.__enter__ = enter_elsewhere  # type: ignore[method-assign]
        torch.autocast.__exit__ = leave_elsewhere  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]
            torch.autocast.__exit__ = leave  # type: ignore[method-assign]


def inline_regions(program: ExportedProgram) -> None:
    """Inline the regions that ``torch.export`` makes of ``no_grad`` and ``enable_grad``."""
    _inline(program.graph_module)


def _inline(module: GraphModule) -> None:
    regions = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and node.target.__name__ == _REGION
    ]
    for node in regions:
        _mode, attribute, *operands = node.args
        region = getattr(module, attribute.target)
        _inline(region)
        _replace(module, node, region, operands)
        if not attribute.users:
            module.graph.erase_node(attribute)
            delattr(module, attribute.target)
    if regions:
        module.recompile()


def _replace(module: GraphModule, node: Node, region: GraphModule, operands: Any) -> None:
    """Replace the call of a region by a copy of its nodes."""
    placeholders = region.graph.find_nodes(op="placeholder")
    copies = dict(zip(placeholders, operands, strict=True))
    for attribute in region.graph.find_nodes(op="get_attr"):
        name = f"{node.name}_{attribute.target}"
        setattr(module, name, getattr(region, attribute.target))
        attribute.target = name
    with module.graph.inserting_before(node):
        results: Any = module.graph.graph_copy(region.graph, copies)
    for user in list(node.users):  # each selects one result
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
