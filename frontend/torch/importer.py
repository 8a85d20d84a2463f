"""Import a PyTorch model with DCNv3 modules into Relax."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tvm
from torch import Tensor, nn
from torch.export import ExportedProgram
from tvm import relax

from dcnv3_tvm.checks import boolean, integer
from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.forks import one_at_a_time
from dcnv3_tvm.frontend.models.config import IMAGENET_MEAN, IMAGENET_STD, InternImageConfig
from dcnv3_tvm.frontend.models.imagenet import IMAGENET_CLASSES, imagenet_labels
from dcnv3_tvm.frontend.torch.entry_points import (
    MODEL_PREFIX,
    PYRAMID_METHODS,
    EntryPoint,
    find_pyramid,
)
from dcnv3_tvm.frontend.torch.entry_signature import describe_outputs, is_pyramid
from dcnv3_tvm.frontend.torch.export import export_entry_point, runs_with_sizes
from dcnv3_tvm.frontend.torch.import_arguments import check_weights, unwrap
from dcnv3_tvm.frontend.torch.model_inputs import Example, ModelInputs
from dcnv3_tvm.frontend.torch.prepare_model import PreparedModel, prepare_model
from dcnv3_tvm.frontend.torch.preprocessing import check_labels, complete_settings
from dcnv3_tvm.frontend.torch.published_call import CORE_SIGNATURE
from dcnv3_tvm.frontend.torch.regions import without_autocast
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from dcnv3_tvm.frontend.torch.sampling_report import sampling_report
from dcnv3_tvm.frontend.torch.shape_guards import ShapeGuards
from dcnv3_tvm.frontend.torch.to_relax import name_dynamic_sizes, to_relax
from dcnv3_tvm.imported_model import ImportedModel, SamplingCheck
from dcnv3_tvm.signature import Entry


@one_at_a_time  # torch.export keeps its state in global variables.
def import_model(
    module: nn.Module,
    *,
    example: Example = (1, 3, 224, 224),
    dynamic_batch: bool = False,
    dynamic_size: bool | int = False,
    name: str | None = None,
    features: Literal["auto", "always", "never"] = "auto",
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> ImportedModel:
    """Import a PyTorch model into Relax, with each DCNv3 as one operator ``dcnv3_tvm.dcnv3``.

    Supported are this library's InternImage, the published classification, detection and
    segmentation classes with either sampling core, the Hugging Face classes, and any other module
    that contains DCNv3 modules. The model and its training mode are not changed; the imported
    model computes in inference mode.

    Parameters
    ----------
    module : nn.Module
        A float32 model whose forward takes tensors.
    example : Tensor, shape, tuple or dict
        What forward is called with: an image batch (N, 3, H, W) or its shape; a tuple of these for
        several inputs, or a dict of these by parameter. An input may be a list, tuple or dict of
        tensors. Inputs are float32, boolean or integer, of any rank; a shape stands for float32.
        Sizes that are not dynamic are fixed to the example.
    dynamic_batch : bool
        Make the first axis of all inputs dynamic.
    dynamic_size : bool or int
        Make H and W dynamic, in all inputs of four axes or more (the last two, unless channels are
        last). A number, for example 32, says that they are multiples of it. With True, a model that
        PyTorch runs for some multiples only is compiled for these. Heights that are equal in the
        examples are equal in every call.
    name : str, optional
        Name of the imported model; by default that of its configuration, or of its class.
    features : str
        Whether to add an entry ``"features"`` that returns the feature pyramid: ``"auto"`` if the
        model can compute one and ``"main"`` does not return it, ``"always"`` (an error if it
        cannot), or ``"never"``.
    preprocessing : mapping, optional
        How images become the first input, for `CompiledModel.preprocess`: ``mean`` and ``std`` (R,
        G and B, for values between 0 and 1); ``crop``, the size of the example by default; and
        ``resize``, the length of the shorter side before the crop, by default the larger side of
        the crop; ``interpolation``, ``"bicubic"`` by default. By default that of the configuration.
    labels : sequence of str, optional
        Names of the classes in order; by default, for an InternImage with 1000 classes,
        ImageNet-1k's.

    Returns
    -------
    ImportedModel
        Its weights share memory with those of `module` that are on the CPU.

    Raises
    ------
    InvalidArgumentError
        If the example, preprocessing or labels are invalid.
    ModelImportError
        If the model contains no DCNv3, takes inputs that the example lacks, or has an operator that
        cannot be converted to Relax; the message lists each with its source line.

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
    if not isinstance(name, str | None):
        raise InvalidArgumentError("name is not a string", got=repr(name))
    dynamic_batch = boolean("dynamic_batch", dynamic_batch)
    multiple = _size_multiple(dynamic_size)
    module = unwrap(module)
    config = getattr(module, "config", None)
    if not isinstance(config, InternImageConfig):
        config = None
    check_weights(module)
    inputs = ModelInputs.of(module, example, dynamic_batch=dynamic_batch, multiple=multiple)
    if preprocessing is None and config is not None:
        preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    settings = complete_settings(preprocessing, inputs.given[0]) if preprocessing else {}

    with without_autocast(), SamplingReplacement() as sampling:
        prepared = prepare_model(module, sampling)
        main = EntryPoint(prepared.model, inputs)
        program, guards = _export(main)
        if multiple == 1:
            multiple = _needed_multiple(main, guards)
            if multiple > 1:
                inputs = ModelInputs.of(
                    module, example, dynamic_batch=dynamic_batch, multiple=multiple
                )
                main = EntryPoint(prepared.model, inputs)
                program, guards = _export(main)
        imported = {"main": _import_entry(main, program, guards, prepared, sampling)}
        if features != "never":
            pyramid = _import_pyramid(imported["main"], prepared, sampling, inputs, features)
            if pyramid is not None:
                imported["features"] = pyramid
    report = tuple(dict.fromkeys(check for each in imported.values() for check in each.report))
    for check in report:
        if not check.replaced:
            warnings.warn(
                f"{check}. To have it computed by the operator, let it call a function "
                f"{CORE_SIGNATURE} that computes DCNv3, or torch.ops.dcnv3_tvm.dcnv3.",
                stacklevel=3,
            )
    if labels is None and config is not None and not config.features_only:
        labels = imagenet_labels() if config.num_classes == IMAGENET_CLASSES else ()
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
            for weight, tensor in (
                *prepared.model.named_parameters(remove_duplicate=False),
                *prepared.model.named_buffers(remove_duplicate=False),
            )
            if weight in used
        },
        config=config.to_json() if config else {},
        preprocessing=settings,
        labels=check_labels(() if labels is None else labels, imported["main"].entry.outputs),
        report=report,
    )


class _ImportedEntry(NamedTuple):
    function: relax.Function
    entry: Entry
    report: tuple[SamplingCheck, ...]


def _size_multiple(dynamic_size: bool | int) -> int:
    """Return what heights and widths are multiples of; 0 if they are fixed."""
    if isinstance(dynamic_size, bool | np.bool_):
        return int(dynamic_size)
    return integer("dynamic_size", dynamic_size, low=1)


def _export(entry_point: EntryPoint) -> tuple[ExportedProgram, ShapeGuards]:
    program = export_entry_point(entry_point)
    return program, ShapeGuards(program, entry_point.inputs.infos, entry_point.inputs.sizes)


def _needed_multiple(main: EntryPoint, guards: ShapeGuards) -> int:
    """Return what sizes must be multiples of where PyTorch runs the model for no others, else 1."""
    failing = guards.failing_sizes()
    if failing is None or runs_with_sizes(main, failing):
        return 1
    return guards.size_multiple() or 1


def _import_pyramid(
    main: _ImportedEntry,
    prepared: PreparedModel,
    sampling: SamplingReplacement,
    inputs: ModelInputs,
    features: str,
) -> _ImportedEntry | None:
    pyramid = find_pyramid(prepared.model, inputs)
    if features == "auto" and (pyramid is None or is_pyramid(main.entry.outputs)):
        return None
    if pyramid is None:
        raise ModelImportError(
            "the model has no method that returns a feature pyramid",
            got=type(prepared.model).__name__,
            allowed=f"a model of one image with a method {' or '.join(PYRAMID_METHODS)}",
            hint="Import it with features='auto'.",
        )
    try:
        return _import_entry(pyramid, *_export(pyramid), prepared, sampling)
    except ModelImportError as error:
        raise ModelImportError(
            "the model's feature pyramid cannot be imported",
            got=str(error),
            hint="Import it with features='never', which leaves the pyramid out.",
        ) from error


def _import_entry(
    entry_point: EntryPoint,
    program: ExportedProgram,
    guards: ShapeGuards,
    prepared: PreparedModel,
    sampling: SamplingReplacement,
) -> _ImportedEntry:
    inputs = entry_point.inputs
    report = sampling_report(program, sampling.checks, prepared.dcnv3_modules)
    guards.check()
    function = name_dynamic_sizes(to_relax(program), inputs.infos)
    names = _parameter_names(program)
    used = set(relax.analysis.free_vars(function.body))
    count = len(inputs.infos)
    weights = [var for var in function.params[count:] if var in used]
    function = relax.Function(
        [*function.params[:count], *weights],
        function.body,
        function.ret_ty,
        function.is_pure,
        function.attrs,
    )
    entry = Entry(
        inputs=inputs.infos,
        outputs=describe_outputs(
            entry_point.output_names,
            function,
            [tuple(example.shape) for example in inputs.examples],
            inputs.spatial_size,
        ),
        weights=tuple(names[var.name] for var in weights),
    )
    return _ImportedEntry(function, entry, report)


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
