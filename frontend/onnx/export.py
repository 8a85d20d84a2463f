"""Export a PyTorch model with DCNv3 modules to ONNX, in a form that other runtimes take."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn
from torch.export import ExportedProgram

from dcnv3_tvm import files
from dcnv3_tvm.errors import InvalidArgumentError, ModelExportError, os_reason
from dcnv3_tvm.forks import one_at_a_time
from dcnv3_tvm.frontend.onnx import FORMS, FormName, dcnv3_node, forms
from dcnv3_tvm.frontend.onnx.graph import (
    Replacement,
    constant_of,
    each_node,
    remove_unused,
    replace_node,
)
from dcnv3_tvm.frontend.torch.entry_points import MODEL_PREFIX, EntryPoint
from dcnv3_tvm.frontend.torch.entry_signature import name_outputs
from dcnv3_tvm.frontend.torch.export import export_entry_point
from dcnv3_tvm.frontend.torch.import_arguments import check_weights, unwrap
from dcnv3_tvm.frontend.torch.model_inputs import Example, ModelInputs
from dcnv3_tvm.frontend.torch.prepare_model import prepare_model
from dcnv3_tvm.frontend.torch.regions import without_autocast
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from dcnv3_tvm.frontend.torch.sampling_report import sampling_report
from dcnv3_tvm.signature import TensorInfo
from dcnv3_tvm.spec import DCNv3Params

OPSETS: Final = range(20, 24)
"""Operator sets that the export supports; DeformConv needs 19, Gelu 20."""

_EMIT: Final[dict[str, forms.Form]] = {
    "deform-conv": forms.deform_conv,
    "grid-sample": forms.grid_sample,
    "plugin": forms.plugin,
}


@one_at_a_time  # torch.export keeps its state in global variables.
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Example = (1, 3, 224, 224),
    form: FormName = "deform-conv",
    dynamic_batch: bool = False,
    opset: int = 20,
    preprocessing: dict[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> ir.Model:
    """Export a PyTorch model with DCNv3 modules to an ONNX file.

    Parameters
    ----------
    model : nn.Module
        As for `import_model`. It is not changed.
    path : path
        File to write. Models of more than 1.5 GB have their weights in ``NAME.data``.
    example : Tensor, shape, tuple or dict
        As for `import_model`.
    form : str
        How DCNv3 is expressed: ``"deform-conv"`` (ONNX Runtime, TensorRT from 10.1),
        ``"grid-sample"`` (OpenVINO and others without DeformConv), ``"plugin"`` (the published
        ``mmdeploy::TRTDCNv3``), or ``"custom"`` (``dcnv3_tvm::DCNv3`` with a function in the file).
    dynamic_batch : bool
        Make the first axis of all inputs dynamic.
    opset : int
        Version of ONNX's operators, one of `OPSETS`.
    preprocessing : dict, optional
        How an image becomes the input; by default that of this library's models.
    labels : sequence of str, optional
        Names of the classes.

    Returns
    -------
    onnx_ir.Model
        What was written.

    Raises
    ------
    InvalidArgumentError
        If an argument is invalid, or the form cannot express an operator of the model.
    ModelImportError
        If the model contains no DCNv3, or PyTorch cannot trace it.
    ModelExportError
        If PyTorch cannot convert it to ONNX, or the file cannot be written.
    """
    if form not in FORMS:
        raise InvalidArgumentError("unknown form", got=repr(form), allowed=", ".join(FORMS))
    if opset not in OPSETS:
        allowed = f"{OPSETS.start} to {OPSETS.stop - 1}"
        raise InvalidArgumentError("unsupported operator set", got=repr(opset), allowed=allowed)
    model = unwrap(model)
    check_weights(model)
    inputs = ModelInputs.of(model, example, dynamic_batch=dynamic_batch, multiple=0)
    with without_autocast(), SamplingReplacement() as sampling:
        prepared = prepare_model(model, sampling)
        entry_point = EntryPoint(prepared.model, inputs)
        program = export_entry_point(entry_point)
    sampling_report(program, sampling.checks, prepared.dcnv3_modules)
    exported = _to_onnx(program, entry_point, opset)
    express(exported, form)
    if preprocessing is None:
        preprocessing = getattr(getattr(model, "config", None), "preprocessing", {})
    exported.metadata_props.update(
        {
            name: json.dumps(value)
            for name, value in (("preprocessing", preprocessing), ("labels", labels))
            if value
        }
    )
    write(exported, Path(path))
    return exported


def express(model: ir.Model, form: FormName) -> None:
    """Express the DCNv3 nodes of a model in a form, in place.

    Raises
    ------
    InvalidArgumentError
        If the form cannot express one.
    """
    graph = model.graph
    for node in each_node(graph, dcnv3_node.is_dcnv3):
        x, offset, mask = node.inputs
        if x is None or offset is None or mask is None:
            raise ModelExportError("a DCNv3 node has no x, offset or mask", got=node.name)
        params = dcnv3_node.params_of(node)
        if form == "custom":
            _add_function(model, node, params)
            continue
        tape = Replacement(node)
        output = forms.emit(_EMIT[form], tape, x, offset, mask, params)
        replace_node(node, output, tape)
    if form == "plugin":
        graph.opset_imports[forms.PLUGIN_DOMAIN] = 1
    if form != "custom":
        graph.opset_imports.pop(dcnv3_node.DOMAIN, None)
    remove_unused(graph)
    for name, value in list(graph.initializers.items()):
        original = name.removesuffix(forms.FOLDED)
        if original not in graph.initializers:
            value.name = original
    ShapeInferencePass()(model)


def _add_function(model: ir.Model, node: ir.Node, params: DCNv3Params) -> None:
    """Give a node a function that expands it for runtimes that do not know it.

    Functions are told apart by their overload, as a node's attributes select the function.
    """
    shapes = "_".join(str(value.shape) for value in node.inputs if value is not None)
    overload = hashlib.sha256(f"{params} {shapes}".encode()).hexdigest()[:16]
    node.overload = overload
    key = (dcnv3_node.DOMAIN, dcnv3_node.OP_TYPE, overload)
    if key in model.functions:
        return
    inputs = [
        ir.val(name, dtype=value.dtype, shape=value.shape)
        for name, value in zip(("x", "offset", "mask"), node.inputs, strict=True)
        if value is not None
    ]
    tape = Replacement(node)
    output = forms.emit(forms.deform_conv, tape, inputs[0], inputs[1], inputs[2], params)
    # A function has no initializers.
    constants = [
        ir.node("Constant", [], {"value": value.const_value}, outputs=[value])
        for value in tape.initializers
    ]
    body = ir.Graph(
        inputs,
        [output],
        nodes=[*constants, *tape.nodes],
        opset_imports={"": model.graph.opset_imports[""]},
    )
    model.functions[key] = ir.Function(
        dcnv3_node.DOMAIN, dcnv3_node.OP_TYPE, overload, graph=body, attributes=[]
    )


def write(model: ir.Model, path: Path) -> None:
    """Write a model with inferred shapes, whole or not at all.

    Raises
    ------
    ModelExportError
        If it cannot be written.
    """
    size = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    data = path.with_name(f"{path.name}.data")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(path) as file:
            if size <= _MAX_INLINE_BYTES:
                ir.save(model, file)
                return
            with files.atomic_file(data) as weights:
                ir.save(model, file, external_data=weights.name)
                _rename_data(file, data.name)
    except OSError as error:
        raise ModelExportError(
            "the ONNX file cannot be written", got=os_reason(error, path)
        ) from error


def _rename_data(file: Path, name: str) -> None:
    """Let a file refer to its weights by the name that they are going to have."""
    proto = onnx.load(file, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    file.write_bytes(proto.SerializeToString())


_MAX_INLINE_BYTES: Final = 1_500_000_000
"""Files of 2 GB and more cannot be parsed; above this, weights go to a file of their own."""


def _to_onnx(program: ExportedProgram, entry_point: EntryPoint, opset: int) -> ir.Model:
    """Export a model with a `dcnv3_node` for each DCNv3."""
    operator = onnxscript.values.Op(
        onnxscript.values.Opset(dcnv3_node.DOMAIN, dcnv3_node.VERSION),
        dcnv3_node.OP_TYPE,
        dcnv3_node.schema(),
    )

    def translate(x: Any, offset: Any, mask: Any, **params: Any) -> Any:
        attributes = dcnv3_node.attributes_of(DCNv3Params(**params))
        return operator(x, offset, mask, **attributes)

    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=[info.name for info in entry_point.inputs.infos],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table={torch.ops.dcnv3_tvm.dcnv3.default: translate},
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelExportError(
            "PyTorch cannot convert the model to ONNX", got=str(error).splitlines()[0]
        ) from error
    assert exported is not None
    model: ir.Model = exported.model
    _name_dynamic_sizes(model.graph, entry_point.inputs.infos)
    # Only the batch may be dynamic.
    shapes = [
        [size if isinstance(size, int) else 1 for size in output.shape or ()]
        for output in model.graph.outputs
    ]
    names = name_outputs(entry_point.output_names, shapes, entry_point.inputs.spatial_size)
    for name, output in zip(names, model.graph.outputs, strict=True):
        output.name = name
    _name_like_state_dict(model.graph)
    _fold_transposes(model.graph)
    onnxscript.optimizer.optimize(model)
    remove_unused(model.graph)
    return model


def _name_dynamic_sizes(graph: ir.Graph, infos: Sequence[TensorInfo]) -> None:
    """Rename the dynamic sizes that torch.export numbered."""
    names: dict[str | None, str] = {}
    for value, info in zip(graph.inputs, infos, strict=False):
        for old, new in zip(value.shape or (), info.shape, strict=True):
            if isinstance(old, ir.SymbolicDim) and isinstance(new, str):
                names[old.value] = new
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    names.get(size.value, size) if isinstance(size, ir.SymbolicDim) else size
                    for size in value.shape
                ]
            )


def _name_like_state_dict(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if name.startswith(MODEL_PREFIX):
            value.name = name.removeprefix(MODEL_PREFIX)


def _fold_transposes(graph: ir.Graph) -> None:
    """Store the weights of linear layers as (in, out), under their own names."""
    for node in each_node(graph, lambda node: node.op_type == "Transpose"):
        weight = node.inputs[0]
        array = constant_of(weight)
        if weight is None or array is None or array.ndim != 2 or len(weight.uses()) != 1:
            continue
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        weight.const_value = ir.tensor(np.ascontiguousarray(array.T), name=weight.name)
        weight.shape = ir.Shape(array.T.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
