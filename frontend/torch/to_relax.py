"""Convert an exported program to a Relax function."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram
from tvm import relax, tirx
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.converters.table import CONVERTERS
from dcnv3_tvm.frontend.torch.decompose import decompose
from dcnv3_tvm.signature import TensorInfo


def to_relax(program: ExportedProgram) -> relax.Function:
    """Convert a program to a function of its inputs, followed by its parameters.

    Raises
    ------
    ModelImportError
        If an operator cannot be converted.
    """
    try:
        program = decompose(program)
        module = translator.from_exported_program(
            program,
            keep_params_as_input=True,
            custom_convert_map=CONVERTERS,
            run_ep_decomposition=False,
        )
    except ModelImportError:
        raise
    except Exception as error:  # PyTorch and TVM's converters raise RuntimeError, KeyError, ...
        raise ModelImportError(
            "TVM cannot convert the exported model", got=f"{type(error).__name__}: {error}"
        ) from error
    return module["main"].without_attr("params")


def name_dynamic_sizes(function: relax.Function, infos: Sequence[TensorInfo]) -> relax.Function:
    """Rename the dynamic sizes of the inputs, the first parameters, as in their signature."""
    names: dict[tirx.Var, tirx.Var] = {}
    named: dict[str, tirx.Var] = {}
    for parameter, info in zip(function.params, infos, strict=False):
        sizes = zip(info.kernel_shape(info.shape), parameter.ty.shape.values, strict=True)
        for name, size in sizes:
            if isinstance(name, str) and isinstance(size, tirx.Var):
                names[size] = named.setdefault(name, tirx.Var(name, "int64"))
    if not names:
        return function
    # torch.export assumes sizes of at least 2, because broadcasting differs for 1. The operators
    # that are left in the graph are valid for 1 as well.
    function = function.with_attr("tir_var_lower_bound", dict.fromkeys(named, 1))
    return function.bind_symbolic_vars(names)
