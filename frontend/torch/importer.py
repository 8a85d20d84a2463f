"""Import a PyTorch model with DCNv3 modules into Relax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tvm
from torch import Tensor, nn
from torch.export import ExportedProgram
from tvm import relax

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.torch.entry_points import (
    MODEL_PREFIX,
    PYRAMID_METHODS,
    EntryPoint,
    find_pyramid,
)
from dcnv3_tvm.frontend.torch.entry_signature import describe_input, describe_outputs, is_pyramid
from dcnv3_tvm.frontend.torch.export import check_dcnv3_calls, export_entry_point
from dcnv3_tvm.frontend.torch.import_arguments import check_weights, example_image, unwrap
from dcnv3_tvm.frontend.torch.prepare_model import PreparedModel, prepare_model
from dcnv3_tvm.frontend.torch.shape_guards import check_shape_guards
from dcnv3_tvm.frontend.torch.to_relax import name_dynamic_sizes, to_relax
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.signature import Entry


def import_model(
    module: nn.Module,
    *,
    example: Tensor | Sequence[int] = (1, 3, 224, 224),
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    name: str | None = None,
    features: Literal["auto", "always", "never"] = "auto",
) -> ImportedModel:
    """Import a PyTorch model into Relax, with each DCNv3 as one operator ``dcnv3_tvm.dcnv3``.

    Supported are this library's InternImage, the published classification, detection and
    segmentation classes with either sampling core, the Hugging Face classes, and any other module
    that contains DCNv3 modules. The model and its training mode are not changed; the imported
    model computes in inference mode.

    Parameters
    ----------
    module : nn.Module
        A float32 model whose forward takes one image batch.
    example : Tensor or (int, int, int, int)
        An image batch (N, 3, H, W) or its shape. Sizes that are not dynamic are fixed to it.
    dynamic_batch, dynamic_size : bool
        Make N, or H and W, dynamic.
    name : str, optional
        Name of the imported model; by default that of its configuration, or of its class.
    features : str
        Whether to add an entry ``"features"`` that returns the feature pyramid: ``"auto"`` if the
        model can compute one and ``"main"`` does not return it, ``"always"`` (an error if it
        cannot), or ``"never"``.

    Returns
    -------
    ImportedModel
        Its weights share memory with those of `module` that are on the CPU.

    Raises
    ------
    InvalidArgumentError
        If the example is invalid, or the head does not support dynamic sizes.
    ModelImportError
        If the model contains no DCNv3, or an operator that cannot be converted to Relax; the
        message lists each with its source line.

    Examples
    --------
    >>> from dcnv3_tvm import frontend
    >>> model = frontend.create_model("test_internimage_pre_norm")
    >>> imported = frontend.import_model(model, example=(1, 3, 64, 64))
    >>> imported.entries["main"].outputs[0].name
    'logits'
    """
    if features not in ("auto", "always", "never"):
        raise InvalidArgumentError(
            "features is invalid", got=repr(features), allowed="'auto', 'always', 'never'"
        )
    module = unwrap(module)
    config = getattr(module, "config", None)
    if not isinstance(config, InternImageConfig):
        config = None
    if config is not None and dynamic_size:
        config.check_dynamic_size()
    check_weights(module)
    image = example_image(module, example, dynamic_batch=dynamic_batch)
    dynamic_axes = {*([0] if dynamic_batch else []), *([2, 3] if dynamic_size else [])}

    prepared = prepare_model(module)
    _buffers_to_parameters(prepared.model)
    main = _import_entry(EntryPoint(prepared.model), prepared, image, dynamic_axes)
    imported = {"main": main}
    if features != "never":
        pyramid = _import_pyramid(main, prepared, image, dynamic_axes, features)
        if pyramid is not None:
            imported["features"] = pyramid
    used = {weight for each in imported.values() for weight in each.entry.weights}
    return ImportedModel(
        name=name or (config.variant if config else _snake_case(type(module).__name__)),
        module=tvm.IRModule(
            {
                entry: each.function.with_attr("global_symbol", entry)
                for entry, each in imported.items()
            }
        ),
        entries={entry: each.entry for entry, each in imported.items()},
        weights={
            weight: _to_numpy(tensor)
            for weight, tensor in prepared.model.named_parameters(remove_duplicate=False)
            if weight in used
        },
        config=config.to_json() if config else {},
        preprocessing=config.preprocessing if config else {},
    )


class _ImportedEntry(NamedTuple):
    function: relax.Function
    entry: Entry


def _buffers_to_parameters(model: nn.Module) -> None:
    """Turn persistent buffers (BatchNorm's statistics) into parameters: weights like any other."""
    for part in model.modules():
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and name not in part._non_persistent_buffers_set:
                del part._buffers[name]
                part.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _import_pyramid(
    main: _ImportedEntry,
    prepared: PreparedModel,
    image: Tensor,
    dynamic_axes: set[int],
    features: str,
) -> _ImportedEntry | None:
    pyramid = find_pyramid(prepared.model)
    if features == "auto" and (pyramid is None or is_pyramid(main.entry.outputs)):
        return None
    if pyramid is None:
        raise ModelImportError(
            "the model has no method that returns a feature pyramid",
            got=type(prepared.model).__name__,
            allowed=f"a model with a method {' or '.join(PYRAMID_METHODS)}",
            hint="Import it with features='auto'.",
        )
    try:
        return _import_entry(pyramid, prepared, image, dynamic_axes)
    except ModelImportError as error:
        raise ModelImportError(
            "the model's feature pyramid cannot be imported",
            got=str(error),
            hint="Import it with features='never', which leaves the pyramid out.",
        ) from error


def _import_entry(
    entry_point: EntryPoint, prepared: PreparedModel, image: Tensor, dynamic_axes: set[int]
) -> _ImportedEntry:
    program = export_entry_point(entry_point, image, dynamic_axes)
    check_dcnv3_calls(program, prepared.dcnv3_modules)
    function = name_dynamic_sizes(to_relax(program))
    check_shape_guards(program, tuple(image.shape), dynamic_axes)
    names = _parameter_names(program)
    used = set(relax.analysis.free_vars(function.body))
    weights = [var for var in function.params[1:] if var in used]
    function = relax.Function(
        [function.params[0], *weights],
        function.body,
        function.ret_ty,
        function.is_pure,
        function.attrs,
    )
    entry = Entry(
        inputs=(describe_input(function),),
        outputs=describe_outputs(entry_point.output_names, function, image.shape),
        weights=tuple(names[var.name] for var in weights),
    )
    return _ImportedEntry(function, entry)


def _parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Map the names of a program's parameters to those of the model's state dict."""
    return {
        spec.arg.name: str(spec.target).removeprefix(MODEL_PREFIX)
        for spec in program.graph_signature.input_specs
        if spec.kind is torch.export.graph_signature.InputKind.PARAMETER
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _to_numpy(weight: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return np.ascontiguousarray(weight.detach().cpu().numpy())
