"""Import ONNX files into Relax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass
from onnxscript import version_converter
from tvm import relax

from dcnv3_tvm.errors import DCNv3Error, InvalidArgumentError, ModelImportError, first_line
from dcnv3_tvm.frontend.onnx import dcnv3_node
from dcnv3_tvm.frontend.onnx.fuse import fuse
from dcnv3_tvm.frontend.onnx.graph import constant_of, remove_unused
from dcnv3_tvm.frontend.onnx.recognize import recognize, replace_plugins
from dcnv3_tvm.frontend.onnx.to_relax import to_relax
from dcnv3_tvm.frontend.torch.entry_signature import describe_outputs
from dcnv3_tvm.frontend.torch.preprocessing import check_labels, complete_settings
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.signature import Entry, TensorInfo, input_layout
from dcnv3_tvm.transform.ir import dimensions, element_type

_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def import_onnx(
    model: str | os.PathLike[str] | ir.Model,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    name: str | None = None,
    preprocessing: dict[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> ImportedModel:
    """Import an ONNX file into Relax, with each DCNv3 as one operator ``dcnv3_tvm.dcnv3``.

    DCNv3 is taken as ``mmdeploy::TRTDCNv3``, as this library's ``dcnv3_tvm::DCNv3``, as
    ``DeformConv``, and as the nodes that exporting ``dcnv3_core_pytorch`` gives. The last are
    compared with the operator on random inputs. A ``GridSample`` that is no DCNv3 stays one.

    Parameters
    ----------
    model : path or onnx_ir.Model
        The file; its external data is in the same folder. Float16 and bfloat16 become float32:
        the type to compute in is chosen when compiling.
    shapes : mapping of str to sequence, optional
        Shapes of inputs; a string names a size that is dynamic in the file too. By default those
        of the file.
    name : str, optional
        Name of the imported model; by default that of the file.
    preprocessing : dict, optional
        How an image becomes the input; by default what `export_onnx` wrote to the file.
    labels : sequence of str, optional
        Names of the classes; by default what `export_onnx` wrote to the file.

    Returns
    -------
    ImportedModel
        With the entry ``"main"``.

    Raises
    ------
    InvalidArgumentError
        If `shapes` names an unknown input, has another rank, or makes a fixed size dynamic.
    ModelImportError
        If the file cannot be read, or has nodes that cannot be converted.
    """
    path = None if isinstance(model, ir.Model) else Path(model)
    loaded = model.clone() if isinstance(model, ir.Model) else _load(Path(model))
    with _one_error():
        _set_shapes(loaded.graph, shapes or {})
        replace_plugins(loaded.graph)
        _simplify(loaded)
        graph = loaded.graph
        report = recognize(graph)
        fuse(graph)
        if not report:
            raise ModelImportError(
                "the ONNX graph contains no DCNv3",
                allowed="a graph with mmdeploy::TRTDCNv3, dcnv3_tvm::DCNv3, DeformConv or "
                "GridSample",
            )
        input_names = [str(value.name) for value in graph.inputs]
        output_names = [str(value.name) for value in graph.outputs]
        module, weights = to_relax(loaded)
        function = _returning_tuple(module["main"])
        entry = _entry(function, input_names, output_names, weights)
        module.update_func(
            module.get_global_var("main"), function.with_attr("global_symbol", "main")
        )
    for check in report:
        if not check.replaced:
            warnings.warn(str(check), stacklevel=2)
    if preprocessing is None:
        preprocessing = _from_metadata(loaded, "preprocessing", {})
    if labels is None:
        labels = _from_metadata(loaded, "labels", [])
    image = dataclasses.replace(entry.inputs[0], shape=tuple(_example(entry.inputs[0].shape)))
    return ImportedModel(
        name=name or _identifier(path.stem if path is not None else graph.name or "model"),
        module=module,
        entries={"main": entry},
        weights=weights,
        preprocessing=complete_settings(preprocessing, image) if preprocessing else {},
        labels=check_labels(labels, entry.outputs),
        report=report,
    )


def input_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int | str, ...]]:
    """Read the shapes of a file's inputs; a string names a dynamic size.

    Raises
    ------
    ModelImportError
        If the file cannot be read.
    """
    graph = _load(Path(path)).graph
    return {
        str(value.name): tuple(
            size if isinstance(size, int) else str(size) for size in value.shape or ()
        )
        for value in graph.inputs
        if value.name not in graph.initializers
    }


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turn what an invalid graph raises into an error of this library."""
    try:
        yield
    except (DCNv3Error, MemoryError):
        raise
    except Exception as error:  # raised by whatever part of ONNX's tools or TVM a graph breaks
        raise ModelImportError(
            "the ONNX graph is not valid, or not supported",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise a dozen types for damaged files
        raise ModelImportError(
            f"{path} cannot be read as an ONNX file", got=f"{type(error).__name__}: {error}"
        ) from error


def _set_shapes(graph: ir.Graph, shapes: Mapping[str, Sequence[int | str]]) -> None:
    inputs = {str(value.name): value for value in graph.inputs if not value.is_initializer()}
    unknown = sorted(shapes.keys() - inputs.keys())
    if unknown:
        raise InvalidArgumentError(
            "shapes names inputs that the model does not have",
            got=", ".join(unknown),
            allowed=", ".join(inputs),
        )
    if shapes:
        for node in graph:
            for output in node.outputs:
                output.shape = None
    for name, shape in shapes.items():
        old = inputs[name].shape
        if old is not None and len(old) != len(shape):
            raise InvalidArgumentError(
                f"the shape of input {name!r} has another number of axes",
                got=tuple(shape),
                allowed=f"{len(old)} axes, as in {old}",
            )
        for before, after in zip(old or (), shape, strict=False):
            if isinstance(before, int) and isinstance(after, str):
                # Reshapes in the graph may hold the size, and would compute something else.
                raise InvalidArgumentError(
                    f"a size of input {name!r} that is fixed in the file cannot become dynamic",
                    got=tuple(shape),
                    allowed=f"{tuple(old or ())}, or other numbers",
                    hint="Export the model with that axis dynamic.",
                )
        inputs[name].shape = ir.Shape(shape)
    for name, value in inputs.items():
        if value.shape is None:
            raise ModelImportError(
                f"the shape of input {name!r} is unknown",
                hint=f"Give it: shapes={{{name!r}: (1, 3, 224, 224)}}.",
            )


def _simplify(model: ir.Model) -> None:
    """Fold constants and infer shapes, in float32 and without functions."""
    for key in [key for key in model.functions if key[:2] == _NODE]:
        del model.functions[key]
    for node in model.graph:
        if (node.domain, node.op_type) == _NODE:
            node.overload = ""
    _constants_to_tensors(model.graph)
    _to_float32(model.graph)
    onnxscript.optimizer.inline(model)
    if model.opset_imports[""] < _OPSET:
        version_converter.convert_version(model, _OPSET, fallback=True)
    # Shapes are computed by constants of a given shape.
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, should_fold=lambda node: _is_small_fill(node) or None
    )
    # Not onnxscript.optimizer.optimize: its rewrite rules take minutes for large graphs.
    for simplify in (IdentityEliminationPass(), LiftConstantsToInitializersPass()):
        simplify(model)
    remove_unused(model.graph)


def _is_small_fill(node: ir.Node) -> bool:
    if node.op_type != "ConstantOfShape":
        return False
    shape = constant_of(node.inputs[0])
    return shape is not None and 0 <= math.prod(shape.tolist()) <= _MAX_FILL


_MAX_FILL: Final = 1_000_000
"""Most elements of a constant that is folded although it is larger than its shape."""

_OPSET: Final = 20
"""Older graphs are converted to this operator set, which has Gelu."""

_NODE = (dcnv3_node.DOMAIN, dcnv3_node.OP_TYPE)


def _constants_to_tensors(graph: ir.Graph) -> None:
    """Store numbers as tensors: TVM knows no other constants."""
    for node in graph:
        if node.op_type == "Constant" and "value" not in node.attributes:
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", tensor)


def _to_float32(graph: ir.Graph) -> None:
    for value in (*graph.inputs, *graph.initializers.values(), *_results(graph)):
        if value.dtype not in _HALF_TYPES:
            continue
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None:
            array = value.const_value.numpy().astype("float32")
            value.const_value = ir.tensor(array, name=value.name)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if node.op_type == "Cast" and name == "to" and attribute.value in _HALF_TYPES:
                node.attributes[name] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            elif attribute.type is ir.AttributeType.TENSOR and attribute.value.dtype in _HALF_TYPES:
                tensor = ir.tensor(attribute.value.numpy().astype("float32"))
                node.attributes[name] = ir.AttrTensor(name, tensor)


def _results(graph: ir.Graph) -> list[ir.Value]:
    return [output for node in graph for output in node.outputs]


def _entry(
    function: relax.Function,
    input_names: Sequence[str],
    output_names: Sequence[str],
    weights: Iterable[str],
) -> Entry:
    """Describe the function."""
    inputs = tuple(
        _describe_input(name, var) for name, var in zip(input_names, function.params, strict=False)
    )
    examples = [_example(info.shape) for info in inputs]
    image = next((example[2:] for example in examples if len(example) == 4), None)
    outputs = describe_outputs(
        output_names, function, examples, None if image is None else (image[0], image[1])
    )
    return Entry(inputs, outputs, tuple(weights))


def _describe_input(name: str, var: relax.Var) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size) for size in dimensions(var))
    return TensorInfo(name, shape, element_type(var), input_layout(shape))


def _returning_tuple(function: relax.Function) -> relax.Function:
    """Let a function with one output return a tuple, as the compiler expects."""
    if isinstance(function.ret_ty, relax.TupleType):
        return function
    body = function.body
    blocks = list(body.blocks)
    output = relax.Var("outputs", relax.TupleType([body.body.ty]))
    blocks.append(relax.BindingBlock([relax.VarBinding(output, relax.Tuple([body.body]))]))
    return relax.Function(
        function.params, relax.SeqExpr(blocks, output), output.ty, function.is_pure
    )


def _example(shape: Sequence[int | str]) -> list[int]:
    """Return a shape with numbers for dynamic sizes."""
    return [
        size if isinstance(size, int) else 2 if axis == 0 else 224
        for axis, size in enumerate(shape)
    ]


def _from_metadata(model: ir.Model, key: str, default: Any) -> Any:
    """Return what `export_onnx` wrote; other tools may use the same key for something else."""
    try:
        value = json.loads(model.metadata_props.get(key, "null"))
    except ValueError:
        return default
    return value if isinstance(value, type(default)) else default


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text)
