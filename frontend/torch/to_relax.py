"""Convert an exported program to a Relax function."""

from __future__ import annotations

from typing import Final

from torch.export import ExportedProgram
from tvm import relax, tirx
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.converters.table import CONVERTERS
from dcnv3_tvm.frontend.torch.decompose import decompose

_SIZE_NAMES: Final = ("n", "c", "h", "w")


def to_relax(program: ExportedProgram) -> relax.Function:
    """Convert a program to a function of its inputs, followed by its parameters.

    Raises
    ------
    ModelImportError
        If an operator cannot be converted.
    """
    program = decompose(program)
    try:
        module = translator.from_exported_program(
            program,
            keep_params_as_input=True,
            custom_convert_map=CONVERTERS,
            run_ep_decomposition=False,
        )
    except ModelImportError:
        raise
    except Exception as error:  # TVM's converters raise assertions, KeyError, ValueError, ...
        raise ModelImportError(
            "TVM cannot convert the exported model", got=f"{type(error).__name__}: {error}"
        ) from error
    return module["main"].without_attr("params")


def name_dynamic_sizes(function: relax.Function) -> relax.Function:
    """Rename the dynamic sizes of the image (the first parameter) to n, h and w.

    Raises
    ------
    ModelImportError
        If the program is valid only up to some size.
    """
    names = {
        size: tirx.Var(name, "int64")
        for name, size in zip(_SIZE_NAMES, function.params[0].ty.shape.values, strict=True)
        if isinstance(size, tirx.Var)
    }
    if not names:
        return function
    bounds = dict(function.attrs.items()).get("tir_var_upper_bound")
    if bounds:
        new_names = {old.name: new.name for old, new in names.items()}
        limits = [f"{new_names.get(name, name)} <= {most}" for name, most in bounds.items()]
        raise ModelImportError(
            "the exported model would not accept larger images",
            got=", ".join(limits),
            hint="Use an example whose smallest feature map has more than one pixel. If the model "
            "computes something else for larger images, import it with fixed sizes.",
        )
    # torch.export assumes sizes of at least 2, because broadcasting differs for 1. The operators
    # that are left in the graph are valid for 1 as well.
    function = function.with_attr("tir_var_lower_bound", {var.name: 1 for var in names.values()})
    return function.bind_symbolic_vars(names)
