"""Convert an exported program to a Relax function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from tvm import relax, tirx
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError, first_line
from dcnv3_tvm.frontend.torch.converters.table import CONVERTERS
from dcnv3_tvm.frontend.torch.decompose import decompose
from dcnv3_tvm.frontend.torch.fx_nodes import unsupported
from dcnv3_tvm.frontend.torch.promote_types import promote_types
from dcnv3_tvm.runtime.tensors import dtype_of
from dcnv3_tvm.signature import TensorInfo
from dcnv3_tvm.transform.ir import dimensions, element_type

_Converter = Callable[[Node, Any], Any]


def to_relax(program: ExportedProgram) -> relax.Function:
    """Convert a program to a function of its inputs, followed by its parameters.

    Raises
    ------
    ModelImportError
        If an operator cannot be converted.
    """
    program = decompose(program)
    promote_types(program)
    importer = translator.ExportedProgramImporter()
    converters: dict[str, _Converter] = {
        name: _without_importer(convert) for name, convert in importer.convert_map.items()
    }
    converters |= CONVERTERS
    try:
        module = importer.from_exported_program(
            program,
            keep_params_as_input=True,
            unwrap_unit_return_tuple=False,
            no_bind_return_tuple=False,
            custom_convert_map={name: _checked(each) for name, each in converters.items()},
        )
    except ModelImportError:
        raise
    except Exception as error:  # TVM raises RuntimeError, KeyError, ...
        raise ModelImportError(
            "TVM cannot convert the exported model", got=f"{type(error).__name__}: {error}"
        ) from error
    return module["main"].without_attr("params")


def _without_importer(convert: Callable[[Node], Any]) -> _Converter:
    return lambda node, _: convert(node)


def _checked(convert: _Converter) -> _Converter:
    """Make a converter's errors name the line, and compare its results with PyTorch's types."""

    def checked(node: Node, importer: Any) -> Any:
        try:
            result = convert(node, importer)
        except ModelImportError:
            raise
        except Exception as error:  # TVM's converters raise AssertionError, KeyError, ...
            raise unsupported(
                f"TVM cannot convert an operator ({type(error).__name__}: {first_line(error)})",
                node,
                "Express it with other PyTorch functions.",
            ) from error
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor) or not node.users:
            return result
        if not isinstance(result.ty, relax.TensorType):  # some converters do not emit it
            result = importer.block_builder.emit(result)
        if not _has_type_of(result, expected):
            raise unsupported(
                f"TVM converts an operator to a {result.ty}, while PyTorch returns "
                f"{tuple(expected.shape)}, {expected.dtype}",
                node,
                "Express it with other PyTorch functions.",
            )
        return result

    return checked


def _has_type_of(result: relax.Expr, expected: Tensor) -> bool:
    """Whether element type and rank are equal, and the sizes where both are fixed."""
    if element_type(result) != dtype_of(expected):
        return False
    if result.ty.shape is None:
        return False
    sizes = dimensions(result)
    return len(sizes) == expected.ndim and all(
        own == size
        for own, size in zip(sizes, expected.shape, strict=True)
        if isinstance(own, int) and isinstance(size, int)
    )


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
