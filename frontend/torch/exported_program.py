"""From a program that torch.export made to one Relax function."""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from tvm import relax
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.converters.table import CONVERTERS
from dcnv3_tvm.frontend.torch.fx_nodes import source_line


def convert(program: ExportedProgram) -> relax.Function:
    """Convert a program to a function of its inputs followed by its parameters.

    Operators that Relax knows are kept whole: a linear layer or a layer norm says more than its
    pieces, and later passes look for them.

    Raises
    ------
    ModelImportError
        If operators cannot be converted; it lists each with the line of its source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = _decomposed_as_needed(program)
    try:
        module = translator.from_exported_program(
            program,
            keep_params_as_input=True,
            custom_convert_map=CONVERTERS,
            run_ep_decomposition=False,
        )
    except ModelImportError:
        raise
    except Exception as error:
        raise ModelImportError(
            "TVM cannot convert the exported model", got=f"{type(error).__name__}: {error}"
        ) from error
    return module["main"].without_attr("params")


def _decomposed_as_needed(program: ExportedProgram) -> ExportedProgram:
    """Take apart what has no converter, and nothing where all is known.

    A decomposition traces the whole program anew, which takes longer than the export did.
    """
    table = torch.export.default_decompositions()
    known = {*translator.ExportedProgramImporter().create_convert_map(), *CONVERTERS}
    known -= _WITHOUT_KERNELS
    chosen: dict[Any, Any] = {}
    settled = all(map(_is_settled, program.graph.nodes))
    decomposed = False
    while True:
        missing = [
            node
            for node in program.graph.nodes
            if node.op == "call_function" and node.target.__name__ not in known
        ]
        if settled and not missing:
            return program
        news = {
            node.target: table[node.target]
            for node in missing
            if node.target in table and node.target not in chosen
        }
        # The first time without a choice still takes blocks without gradients apart.
        if decomposed and not news:
            raise _unsupported(missing)
        chosen |= news
        program = program.run_decompositions(chosen)
        settled = decomposed = True


def _is_settled(node: Node) -> bool:
    """Tell whether a decomposition would leave a node as it is, or give the same Relax.

    It makes new tensors of what is changed in place, and other operators of many views.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    if schema.is_mutable:
        return False
    if not any(result.alias_info for result in schema.returns):
        return True
    # TVM finds no shape for what joins sizes known only at run time.
    return node.target.__name__ in _VIEWS and _symbols(node) == _symbols(node.args[0])


def _symbols(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape if not isinstance(size, int)]


def _unsupported(nodes: list[Node]) -> ModelImportError:
    return ModelImportError(
        f"the model holds {len(nodes)} operations that cannot become Relax",
        got="".join(f"\n  {source_line(node)}" for node in nodes),
        hint="Write them with other PyTorch functions.",
    )


_VIEWS: Final = frozenset(
    {
        "contiguous.default",
        "flatten.using_ints",
        "permute.default",
        "reshape.default",
        "squeeze.dim",
        "to.dtype",
        "transpose.int",
        "unflatten.int",
        "unsqueeze.default",
        "view.default",
    }
)
"""Names of what may be a view, and is converted to the same with and without a decomposition."""

_WITHOUT_KERNELS: Final = frozenset(
    {
        "argsort.default",
        "cumprod.default",
        "cumsum.default",
        "median.default",
        "median.dim",
        "sort.default",
        "topk.default",
    }
)
"""Names of what TVM converts to operators that only its own sorting library computes."""
