"""Import a PyTorch model that holds DCNv3 modules into Relax."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
import tvm
from torch import Tensor, nn
from torch.export import ExportedProgram
from tvm import relax, tirx

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.torch.entry_points import (
    MODEL_PREFIX,
    PYRAMID_METHODS,
    EntryPoint,
    describe_input,
    describe_outputs,
    is_pyramid,
    pyramid_of,
)
from dcnv3_tvm.frontend.torch.exported_program import convert
from dcnv3_tvm.frontend.torch.prepare_model import PreparedModel, prepare_model
from dcnv3_tvm.frontend.torch.shape_guards import check_guards
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.signature import Entry

_AXES: Final = ("n", "c", "h", "w")


def import_model(
    module: nn.Module,
    *,
    example: Tensor | Sequence[int] = (1, 3, 224, 224),
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    name: str | None = None,
    features: Literal["auto", "always", "never"] = "auto",
) -> ImportedModel:
    """Turn a PyTorch model into Relax, with every DCNv3 as one operator ``dcnv3_tvm.dcnv3``.

    The model is taken as it is: this library's own InternImage, the published classification,
    detection and segmentation classes with either sampling core, the Hugging Face classes, copies
    by others, and any module that holds DCNv3 modules. It is not changed, and neither is its
    training mode; the result is that of inference mode.

    Parameters
    ----------
    module : nn.Module
        float32 model of one image argument.
    example : Tensor or (int, int, int, int)
        An image batch (N, 3, H, W) or its shape. Sizes that are not dynamic stay fixed to it.
    dynamic_batch, dynamic_size : bool
        Leave N, or H and W, to the run time.
    name : str, optional
        Name of the result; by default that of the model's configuration, or of its class.
    features : str
        Whether to add an entry ``"features"`` that returns the feature pyramid: ``"auto"`` where
        the model can compute one and ``"main"`` does not, ``"always"`` (an error where it
        cannot), ``"never"``.

    Returns
    -------
    ImportedModel
        Its weights share memory with those of `module` where these lie on the CPU.

    Raises
    ------
    InvalidArgumentError
        If the example does not fit, or the head does not take images of any size.
    ModelImportError
        If the model holds no DCNv3, or something that cannot become Relax; the message lists
        every such node with the line of its source.

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
            "features is not known", got=repr(features), allowed="'auto', 'always', 'never'"
        )
    module = _unwrapped(module)
    config = getattr(module, "config", None)
    known = config if isinstance(config, InternImageConfig) else None
    if known is not None and dynamic_size:
        known.check_dynamic_size()
    _check_weights(module)
    image = _example_image(module, example, dynamic_batch=dynamic_batch)
    dynamic = dict.fromkeys([0] if dynamic_batch else [], torch.export.Dim.DYNAMIC)
    dynamic |= dict.fromkeys([2, 3] if dynamic_size else [], torch.export.Dim.DYNAMIC)

    prepared = prepare_model(module)
    _buffers_to_parameters(prepared.model)
    parts = {"main": _import_entry(EntryPoint(prepared.model), prepared, image, dynamic)}
    if features != "never":
        part = _import_pyramid(parts["main"], prepared, image, dynamic, features)
        if part is not None:
            parts["features"] = part
    used = {weight for part in parts.values() for weight in part.entry.weights}
    return ImportedModel(
        name=name or (known.variant if known else _snake_case(type(module).__name__)),
        module=tvm.IRModule(
            {
                entry: part.function.with_attr("global_symbol", entry)
                for entry, part in parts.items()
            }
        ),
        entries={entry: part.entry for entry, part in parts.items()},
        weights={
            weight: _to_numpy(tensor)
            for weight, tensor in prepared.model.named_parameters(remove_duplicate=False)
            if weight in used
        },
        config=known.to_json() if known else {},
        preprocessing=known.preprocessing if known else {},
    )


class _Part(NamedTuple):
    """One imported entry."""

    function: relax.Function
    entry: Entry


def _unwrapped(module: nn.Module) -> nn.Module:
    """Take a model out of what torch.compile or data parallelism put around it."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelImportError(
            "a TorchScript module cannot be imported",
            got=type(module).__name__,
            hint="Import the Python module that it was made from.",
        )
    if not isinstance(module, nn.Module):
        raise InvalidArgumentError(
            "module is no PyTorch model", got=type(module).__name__, allowed="a torch.nn.Module"
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(module.module)
    original = getattr(module, "_orig_mod", None)
    return _unwrapped(original) if isinstance(original, nn.Module) else module


def _check_weights(module: nn.Module) -> None:
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_meta:
            raise ModelImportError(
                "the model has no weights, only their shapes",
                got=f"{name} on the meta device",
                hint="Build the model on the CPU and load a checkpoint.",
            )
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ModelImportError(
                "the model is not float32",
                got=f"{name}: {weight.dtype}",
                allowed="float32 weights",
                hint="Import model.float(), and choose the precision when compiling.",
            )


def _example_image(
    module: nn.Module, example: Tensor | Sequence[int], *, dynamic_batch: bool
) -> Tensor:
    shape = tuple(example.shape if isinstance(example, Tensor) else example)
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidArgumentError(
            "the example is no batch of images", got=f"shape {shape}", allowed="(N, 3, H, W)"
        )
    if isinstance(example, Tensor) and example.dtype != torch.float32:
        raise InvalidArgumentError(
            "the example has another dtype than the model",
            got=str(example.dtype),
            allowed="torch.float32",
            hint="Use image.float(), normalised as the model expects it.",
        )
    weight = next(module.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    image = example.to(device) if isinstance(example, Tensor) else torch.zeros(shape, device=device)
    if dynamic_batch and shape[0] == 1:
        # torch.export takes a size of 1 for a constant.
        image = image.expand(2, -1, -1, -1).contiguous()
    return image


def _buffers_to_parameters(model: nn.Module) -> None:
    """Make weights of the buffers too (BatchNorm's statistics), under their state-dict names."""
    for part in model.modules():
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and name not in part._non_persistent_buffers_set:
                del part._buffers[name]
                part.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _import_pyramid(
    main: _Part, prepared: PreparedModel, image: Tensor, dynamic: dict[int, Any], features: str
) -> _Part | None:
    pyramid = pyramid_of(prepared.model)
    if features == "auto" and (pyramid is None or is_pyramid(main.entry.outputs)):
        return None
    if pyramid is None:
        raise ModelImportError(
            "the model offers no feature pyramid",
            got=type(prepared.model).__name__,
            allowed=f"a model with a method {' or '.join(PYRAMID_METHODS)}",
            hint="Import it with features='auto'.",
        )
    try:
        return _import_entry(pyramid, prepared, image, dynamic)
    except ModelImportError as error:
        raise ModelImportError(
            "the model's feature pyramid cannot be imported",
            got=str(error),
            hint="Import it with features='never' for its forward alone.",
        ) from error


def _import_entry(
    entry_point: EntryPoint, prepared: PreparedModel, image: Tensor, dynamic: dict[int, Any]
) -> _Part:
    program = _export(entry_point, image, dynamic)
    _check_operators(program, prepared)
    function = _with_named_sizes(convert(program))
    check_guards(program, tuple(image.shape), set(dynamic))
    kind = torch.export.graph_signature.InputKind.PARAMETER
    names = {
        spec.arg.name: str(spec.target).removeprefix(MODEL_PREFIX)
        for spec in program.graph_signature.input_specs
        if spec.kind is kind
    }
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
        outputs=describe_outputs(entry_point.recorded.names, function, image.shape),
        weights=tuple(names[var.name] for var in weights),
    )
    return _Part(function, entry)


def _export(entry_point: EntryPoint, image: Tensor, dynamic: dict[int, Any]) -> ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
            return torch.export.export(
                entry_point,
                (image,),
                dynamic_shapes={"image": dynamic} if dynamic else None,
                strict=False,
            )
    except (ModelImportError, InvalidArgumentError):
        raise
    except Exception as error:
        if dynamic:
            hint = "Try it with fixed sizes: dynamic_batch=False, dynamic_size=False."
        else:
            hint = "Does the model run on this example: (N, 3, H, W), channels first?"
        raise ModelImportError(
            "torch.export cannot trace the model",
            got=f"example {tuple(image.shape)}: {type(error).__name__}: {error}",
            hint=hint,
        ) from error


def _check_operators(program: ExportedProgram, prepared: PreparedModel) -> None:
    """Every DCNv3 module that ran must have left the operator in the graph, not its pieces."""
    ran: set[str] = set()
    with_operator: set[str] = set()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {}).values()
        paths = {re.sub(r"^L\['self'\]\.", "", str(path)) for path, _ in stack}
        ran |= paths
        if node.target is torch.ops.dcnv3_tvm.dcnv3.default:
            with_operator |= paths
    modules = {f"{MODEL_PREFIX}{path}".rstrip("."): path for path in prepared.dcnv3_modules}
    without = sorted(path for key, path in modules.items() if key in ran - with_operator)
    if not with_operator or without:
        raise ModelImportError(
            "the DCNv3 operator is not called where it should be",
            got=f"DCNv3 modules without it: {', '.join(without)}" if without else "no call at all",
            hint="Does a forward import or choose its sampling function while it runs? Let it "
            "call a global dcnv3_core_pytorch, or dcnv3_tvm.pytorch.operator.dcnv3.",
        )


def _with_named_sizes(function: relax.Function) -> relax.Function:
    """Call the dynamic sizes of the image n, h and w."""
    names = {}
    for axis, dim in zip(_AXES, function.params[0].ty.shape.values, strict=True):
        if isinstance(dim, tirx.Var):
            names[dim] = tirx.Var(axis, "int64")
    if not names:
        return function
    bounds = dict(function.attrs.items()).get("tir_var_upper_bound")
    if bounds:
        known = {old.name: new.name for old, new in names.items()}
        raise ModelImportError(
            "the exported model would take no larger image",
            got=", ".join(f"{known.get(name, name)} <= {most}" for name, most in bounds.items()),
            hint="Give an example large enough that the smallest map has more than one pixel. If "
            "the model computes other things for larger ones, import it with fixed sizes.",
        )
    # torch.export assumes at least 2 everywhere, where a step of the code would differ for 1; what
    # is left in the graph holds for 1 as well.
    function = function.with_attr("tir_var_lower_bound", {var.name: 1 for var in names.values()})
    return function.bind_symbolic_vars(names)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _to_numpy(weight: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return np.ascontiguousarray(weight.detach().cpu().numpy())
