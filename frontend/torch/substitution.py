"""Prepare a copy of a PyTorch model whose DCNv3 modules call this library's operator.

DCNv3 modules are recognised by what they have, wherever they were imported from. The published
ones compute everything but the sampling themselves and hand that to a function they know by name:
``dcnv3_core_pytorch``, or the autograd function ``DCNv3Function`` in front of the CUDA extension.
In the copy each of their methods is built anew with that name bound to this library's operator.
The rest of the method, the class, and the caller's module stay as they are, and the CUDA function
is never entered.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.pytorch import operator as torch_op
from dcnv3_tvm.spec import PARAMETERS, DCNv3Params

_CORE: Final = "dcnv3_core_pytorch"
_FUNCTION: Final = "DCNv3Function"
_CHECKPOINTING: Final = ("with_cp", "gradient_checkpointing", "use_checkpoint")
_FOREIGN: Final = sys.stdlib_module_names | {
    "huggingface_hub",
    "mmcv",
    "mmengine",
    "numpy",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}
_TOLERANCE: Final = 1e-4


class Prepared(NamedTuple):
    """A copy of a model, ready for export.

    Parameters
    ----------
    model : nn.Module
        Shares its tensors with the original; in inference mode.
    dcnv3_modules : tuple of str
        Paths of the modules that call the operator.
    """

    model: nn.Module
    dcnv3_modules: tuple[str, ...]


def prepare(module: nn.Module) -> Prepared:
    """Copy `module` without its tensors and lead its DCNv3 modules to this library's operator.

    Parameters
    ----------
    module : nn.Module
        Any module that holds DCNv3 modules. It is not changed.

    Raises
    ------
    ModelImportError
        If it holds none, or one that computes something else.
    """
    model = _copy_sharing_tensors(module)
    rebuilt = _Rebuilt()
    found = []
    for path, part in model.named_modules():
        # Not model.eval(): the published detection class returns None from train().
        part.training = False
        for flag in _CHECKPOINTING:
            if isinstance(getattr(part, flag, None), bool):
                setattr(part, flag, False)
        if rebuilt.apply(part):
            found.append(path)
        elif _looks_like_dcnv3(part):
            _replace_forward(part, path)
            found.append(path)
    if not found:
        raise ModelImportError(
            "the model holds no DCNv3 module",
            got=type(module).__name__,
            allowed="a model with modules that have offset, mask, input_proj and output_proj "
            f"layers, or that call {_CORE} or {_FUNCTION}",
        )
    return Prepared(model, tuple(found))


def _copy_sharing_tensors(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for part in module.modules():
        groups = (part._parameters, part._buffers, vars(part))
        tensors = [t for group in groups for t in group.values() if isinstance(t, Tensor)]
        memo |= {id(tensor): tensor for tensor in tensors}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelImportError(
            "the model cannot be copied, and the original must not be changed",
            got=f"{type(error).__name__}: {error}",
            hint="Remove from the module what copy.deepcopy refuses (open files, locks, graphs).",
        ) from error


def _core(
    input: Tensor,  # noqa: A002 the published name, which callers may use as a keyword
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    remove_center: bool | int = False,
) -> Tensor:
    """Stand in for ``dcnv3_core_pytorch``; old versions pass no `remove_center`."""
    del group_channels
    return torch_op.dcnv3(
        input,
        offset,
        mask,
        group=group,
        kernel_size=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        pad=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        offset_scale=float(offset_scale),
        remove_center=bool(remove_center),
    )


class _Function:
    """Stands in for ``DCNv3Function``."""

    @staticmethod
    def apply(*arguments: Any) -> Tensor:
        """Take the published order: as `_core`, with ``im2col_step`` before `remove_center`."""
        common, rest = arguments[:14], arguments[14:]
        return _core(*common, *rest[1:])


class _ModuleView(types.ModuleType):
    """A Python module as it is, but for some names."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Rebuilt:
    """Functions built anew with the sampling function exchanged; each original once."""

    def __init__(self) -> None:
        self._functions: dict[types.FunctionType, types.FunctionType] = {}
        self._calls_operator: set[object] = set()
        self._open: set[types.ModuleType] = set()

    def apply(self, part: nn.Module) -> bool:
        """Bind the rebuilt methods to `part`; tell whether it calls this library's operator."""
        calls = False
        for name, value in list(_attributes(part)):
            new = self._value(name, value, ())
            if new is not value:
                setattr(part, name, new)
                calls = True
            else:
                function = getattr(value, "__func__", value)
                calls = calls or function in self._calls_operator
        return calls

    def _value(self, name: str, value: Any, used: tuple[str, ...]) -> Any:
        """Return what takes the place of `value`, known as `name`: mostly `value` itself."""
        own = getattr(value, "__name__", None) if callable(value) else None
        if _CORE in (name, own):
            return _core
        if _FUNCTION in (name, own):
            return _Function
        owner = getattr(value, "__self__", None)
        if own == "apply" and isinstance(owner, type) and owner.__name__ == _FUNCTION:
            return _Function.apply
        if isinstance(value, functools.partial):
            inner = self._value("", value.func, used)
            if inner is not value.func:
                return functools.partial(inner, *value.args, **value.keywords)
        if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            method = self._value("", value.__func__, used)
            return value if method is value.__func__ else types.MethodType(method, owner)
        if isinstance(value, types.FunctionType) and not _is_foreign(value.__module__):
            return self._function(value)
        if isinstance(value, types.ModuleType) and not _is_foreign(value.__name__):
            return self._module(value, used)
        return value

    def _module(self, module: types.ModuleType, used: tuple[str, ...]) -> types.ModuleType:
        if module in self._open:  # modules import one another
            return module
        self._open.add(module)
        members = {name: vars(module)[name] for name in used if name in vars(module)}
        replaced = {name: self._value(name, value, used) for name, value in members.items()}
        self._open.remove(module)
        changed = {name: new for name, new in replaced.items() if new is not members[name]}
        return _ModuleView(module, changed) if changed else module

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        known = self._functions.get(function)
        if known is not None:
            return known
        self._functions[function] = function  # ends the recursion of a function that calls itself
        names = tuple(_names(function.__code__))
        changed = {}
        if "dcnv3_tvm" in names:  # torch.ops.dcnv3_tvm.dcnv3
            self._calls_operator.add(function)
        for name in names:
            old = function.__globals__.get(name)
            if old is torch_op or old is torch_op.dcnv3:
                self._calls_operator.add(function)
                continue
            new = self._value(name, old, names)
            if new is not old:
                changed[name] = new
            elif isinstance(old, types.FunctionType) and old in self._calls_operator:
                self._calls_operator.add(function)
        cells, cells_changed = self._cells(function)
        if not changed and not cells_changed:
            return function
        result = types.FunctionType(
            function.__code__,
            {**function.__globals__, **changed},
            function.__name__,
            function.__defaults__,
            cells,
        )
        result.__kwdefaults__ = function.__kwdefaults__
        result.__dict__.update(function.__dict__)
        self._functions[function] = result
        return result

    def _cells(
        self, function: types.FunctionType
    ) -> tuple[tuple[types.CellType, ...] | None, bool]:
        """Rebuild what a function closes over: a decorator holds the method in a cell."""
        if function.__closure__ is None:
            return None, False
        cells, changed = [], False
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            try:
                old = cell.cell_contents
            except ValueError:  # empty: a name that is not bound yet
                cells.append(cell)
                continue
            new = self._value(name, old, ())
            changed = changed or new is not old
            if isinstance(old, types.FunctionType) and old in self._calls_operator:
                self._calls_operator.add(function)
            cells.append(cell if new is old else types.CellType(new))
        return tuple(cells), changed


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield methods as bound methods, and what else of the instance may be a function."""
    yield from ((n, v) for n, v in vars(part).items() if not n.startswith("__") and callable(v))
    seen = set(vars(part))
    for cls in type(part).__mro__:
        if cls is nn.Module:
            return
        for name, value in vars(cls).items():
            if name in seen:
                continue
            seen.add(name)
            if isinstance(value, types.FunctionType):
                yield name, types.MethodType(value, part)
            elif isinstance(value, staticmethod):
                yield name, value.__func__


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_foreign(module: str | None) -> bool:
    """Tell whether a Python module holds no DCNv3: there is no need to walk through PyTorch."""
    return module is not None and module.split(".")[0] in _FOREIGN


def _looks_like_dcnv3(part: nn.Module) -> bool:
    projections = [getattr(part, n, None) for n in ("offset", "mask", "input_proj", "output_proj")]
    layers = [layer for layer in projections if isinstance(layer, nn.Linear)]
    if len(layers) < len(projections):
        return False
    try:
        params = _params_of(part)
    except (InvalidArgumentError, TypeError):
        return False
    channels = tuple(layer.out_features for layer in layers[:2])
    return channels == (params.offset_channels, params.mask_channels)


def _params_of(part: Any) -> DCNv3Params:
    """Read the attributes of a published module, which has its softmax outside the operator."""
    names = (name for name in PARAMETERS if name != "softmax" and hasattr(part, name))
    return DCNv3Params(**{name: getattr(part, name) for name in names})


def _replace_forward(part: nn.Module, path: str) -> None:
    """Give a module with a sampling core of its own the published forward, if it computes that."""
    where = f"{path} ({type(part).__module__}.{type(part).__name__})"
    hint = (
        f"Let its forward call a global function {_CORE}(x, offset, mask, kernel_h, kernel_w, "
        "stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, group_channels, "
        "offset_scale, remove_center), or dcnv3_tvm.pytorch.operator.dcnv3."
    )
    try:
        difference = _difference_to_published(part)
    except Exception as error:
        raise ModelImportError(
            "a DCNv3 module computes the sampling in its own way, and running it on the CPU to "
            "see whether it is the published one failed",
            got=f"{where}: {type(error).__name__}: {error}",
            hint=hint,
        ) from error
    if not difference <= _TOLERANCE:
        raise ModelImportError(
            "a DCNv3 module computes something else than the published one",
            got=f"{where}, relative difference {difference:.1e}",
            allowed=f"at most {_TOLERANCE:.0e}",
            hint=hint,
        )
    part.forward = types.MethodType(_published_forward, part)


def _difference_to_published(part: nn.Module) -> float:
    """Compare on a small random input, with weights that do deform."""
    trial = copy.deepcopy(part).to(device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    channels = trial.get_parameter("input_proj.weight").shape[1]
    with torch.no_grad():
        for name in ("offset", "mask"):
            weight = trial.get_parameter(f"{name}.weight")
            weight.copy_(torch.randn(weight.shape, generator=generator) / channels**0.5)
        x = torch.randn((2, 7, 9, channels), generator=generator)
        got, expected = trial(x), _published_forward(trial, x)
    return float((got - expected).abs().max() / expected.abs().max())


def _published_forward(self: Any, x: Tensor) -> Tensor:
    projected = self.input_proj(x)
    local = self.dw_conv(x.permute(0, 3, 1, 2))
    params = _params_of(self)
    logits = self.mask(local).unflatten(-1, (params.group, -1))
    mask = F.softmax(logits, -1).flatten(-2)
    y = torch_op.dcnv3(projected, self.offset(local), mask, **params.keywords())
    if getattr(self, "center_feature_scale", False):
        gate = torch.sigmoid(
            F.linear(
                local,
                self.center_feature_scale_proj_weight,
                self.center_feature_scale_proj_bias,
            )
        )
        gate = gate.repeat_interleave(projected.shape[-1] // params.group, dim=-1)
        y = y * (1 - gate) + projected * gate
    result: Tensor = self.output_proj(y)
    return result
