"""Outputs of all entries of a compiled model."""

from __future__ import annotations

from typing import Any

from dcnv3_tvm.runtime import CompiledModel
from dcnv3_tvm.signature import OFFSETS, function_of


def entry_outputs(compiled: CompiledModel, *inputs: Any) -> dict[str, list[Any]]:
    """Call the entries of a model that return what it computes, not how it samples.

    Parameters
    ----------
    compiled : CompiledModel
        The model.
    *inputs : array
        Inputs, the same for every entry.

    Returns
    -------
    dict of str to list of array
        The outputs of each entry, in order.
    """
    found = {}
    for entry in compiled.metadata.entries:
        if entry == OFFSETS or function_of(entry) != entry:
            continue
        outputs = compiled.features(*inputs) if entry == "features" else compiled(*inputs)
        if isinstance(outputs, dict):
            outputs = list(outputs.values())
        found[entry] = outputs if isinstance(outputs, list) else [outputs]
    return found
