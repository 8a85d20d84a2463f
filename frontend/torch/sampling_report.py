"""Report which functions and modules of an exported model the operator replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch.export import ExportedProgram

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.entry_points import MODEL_PREFIX
from dcnv3_tvm.frontend.torch.published_call import CORE_NAME, FUNCTION_NAME
from dcnv3_tvm.imported_model import SamplingCheck


def sampling_report(
    program: ExportedProgram,
    functions: Iterable[SamplingCheck],
    modules: Mapping[str, SamplingCheck | None],
) -> tuple[SamplingCheck, ...]:
    """Return what was found about the code that ran.

    Parameters
    ----------
    program : ExportedProgram
        An exported entry point.
    functions : iterable of SamplingCheck
        Of the sampling functions that were called.
    modules : mapping of str to SamplingCheck or None
        Of the modules with the layers of DCNv3, by path; None for those that call the operator or
        a sampling function.

    Raises
    ------
    ModelImportError
        If nothing in the program samples as DCNv3 does.
    """
    ran, with_operator = _modules_that_ran(program)
    report = list(functions)
    for path, check in modules.items():
        name = f"{MODEL_PREFIX}{path}".rstrip(".")
        # A module that could not be compared may have called a sampling function all the same.
        if check and name in ran and (check.replaced or name not in with_operator):
            report.append(check)
    if not report and not with_operator:
        raise ModelImportError(
            "the model contains no DCNv3 module",
            got="a model that calls no such module or function",
            allowed="a model with modules that have offset, mask, input_proj and output_proj "
            f"layers, or that call {CORE_NAME}, {FUNCTION_NAME} or torch.ops.dcnv3_tvm.dcnv3",
        )
    return tuple(report)


def _modules_that_ran(program: ExportedProgram) -> tuple[set[str], set[str]]:
    """Return the names of all modules that ran, and of those that called the operator."""
    ran: set[str] = set()
    with_operator: set[str] = set()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {}).values()
        names = {re.sub(r"^L\['self'\]\.", "", str(path)) for path, _ in stack}
        ran |= names
        if node.target is torch.ops.dcnv3_tvm.dcnv3.default:
            with_operator |= {*names, ""}
    return ran, with_operator
