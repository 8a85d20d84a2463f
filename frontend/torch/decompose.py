"""Decompose the operators of an exported program that have no converter to Relax.

All other operators stay whole: later passes match a linear layer or a layer norm as one operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.converters.table import CONVERTERS
from dcnv3_tvm.frontend.torch.fx_nodes import source_line

_WITHOUT_KERNELS: Final = frozenset(
    {
        "argsort.default",
        "cumprod.default",
        "median.default",
        "median.dim",
        "sort.default",
        "topk.default",
    }
)
"""Operators that TVM lowers to calls of its sorting library (``tvm.contrib.sort``)."""

_VIEWS: Final = frozenset(
    {
        "contiguous.default",
        "expand.default",
        "flatten.using_ints",
        "permute.default",
        "reshape.default",
        "select.int",
        "slice.Tensor",
        "squeeze.dim",
        "to.dtype",
        "transpose.int",
        "unflatten.int",
        "unsqueeze.default",
        "view.default",
    }
)
"""Operators that may return a view and have the same conversion with or without decomposition."""


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Decompose until every operator has a converter; return `program` itself if all have one.

    ``run_decompositions`` traces the whole program again, which takes longer than the export.

    Raises
    ------
    ModelImportError
        If operators without a converter remain; it lists each with its source line.
    """
    table = torch.export.default_decompositions()
    convertible = {*translator.ExportedProgramImporter().create_convert_map(), *CONVERTERS}
    convertible -= _WITHOUT_KERNELS
    selected: dict[Any, Any] = {}
    is_functional = all(map(_is_functional, program.graph.nodes))
    decomposed = False
    while True:
        missing = [
            node
            for node in program.graph.nodes
            if node.op == "call_function" and node.target.__name__ not in convertible
        ]
        if is_functional and not missing:
            return program
        new = {
            node.target: table[node.target]
            for node in missing
            if node.target in table and node.target not in selected
        }
        # The first call also functionalises the graph.
        if decomposed and not new:
            raise ModelImportError(
                f"the model contains {len(missing)} operators that cannot be converted to Relax",
                got="".join(f"\n  {source_line(node)}" for node in missing),
                hint="Express them with other PyTorch functions.",
            )
        selected |= new
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised inside PyTorch
            program = program.run_decompositions(selected)
        is_functional = decomposed = True


def _is_functional(node: Node) -> bool:
    """Whether functionalisation would leave the node, or its conversion to Relax, unchanged."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    if schema.is_mutable:
        return False
    if not any(result.alias_info for result in schema.returns):
        return True
    if node.target.__name__ not in _VIEWS:
        return False
    # TVM cannot infer a size where a view combines dynamic sizes.
    return not _infers_size(node) or _symbols(node) == _symbols(node.args[0])


def _infers_size(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if name not in ("reshape.default", "unflatten.int", "view.default"):
        return False
    return -1 in cast("Sequence[object]", node.args[-1])


def _symbols(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape if not isinstance(size, int)]
