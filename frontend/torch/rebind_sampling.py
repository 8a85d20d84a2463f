"""Rebind the sampling function that published DCNv3 modules call to this library's operator.

Published modules compute offsets and mask themselves and call a function with a known name:
``dcnv3_core_pytorch``, or ``DCNv3Function`` around the CUDA extension. Each function on the way
from a module's methods to that name is copied with new globals, in which the name refers to a
replacement. The original functions, classes and modules stay unchanged, and the CUDA extension is
never called.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

from dcnv3_tvm.frontend.torch import published_functions
from dcnv3_tvm.frontend.torch.published_functions import CORE_NAME, FUNCTION_NAME
from dcnv3_tvm.pytorch import operator as torch_op

_WITHOUT_DCNV3: Final = sys.stdlib_module_names | {
    "huggingface_hub",
    "mmcv",
    "mmengine",
    "numpy",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}
"""Packages whose functions are not searched."""


class SamplingRebinder:
    """Copies functions with the sampling function replaced; each original is copied once."""

    def __init__(self) -> None:
        self._copies: dict[types.FunctionType, types.FunctionType] = {}
        self._calls_operator: set[object] = set()
        self._visiting: set[types.ModuleType] = set()

    def rebind(self, part: nn.Module) -> bool:
        """Rebind the methods of `part`; return whether any calls this library's operator."""
        calls_operator = False
        for name, value in list(_callables(part)):
            new = self._replacement(name, value, ())
            if new is not value:
                setattr(part, name, new)
                calls_operator = True
            elif getattr(value, "__func__", value) in self._calls_operator:
                calls_operator = True
        return calls_operator

    def _replacement(self, name: str, value: Any, used: tuple[str, ...]) -> Any:
        """Return the replacement of `value`, or `value` itself if it does not sample.

        `name` is the name that the code uses for `value`, `used` are all names in that code.
        """
        own_name = getattr(value, "__name__", None) if callable(value) else None
        if CORE_NAME in (name, own_name):
            return published_functions.core
        if FUNCTION_NAME in (name, own_name):
            return published_functions.Function
        owner = getattr(value, "__self__", None)
        if own_name == "apply" and isinstance(owner, type) and owner.__name__ == FUNCTION_NAME:
            return published_functions.Function.apply
        if isinstance(value, functools.partial):
            inner = self._replacement("", value.func, used)
            if inner is not value.func:
                return functools.partial(inner, *value.args, **value.keywords)
        if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            method = self._replacement("", value.__func__, used)
            return value if method is value.__func__ else types.MethodType(method, owner)
        if isinstance(value, types.FunctionType) and _may_hold_dcnv3(value.__module__):
            return self._function(value)
        if isinstance(value, types.ModuleType) and _may_hold_dcnv3(value.__name__):
            return self._module(value, used)
        return value

    def _module(self, module: types.ModuleType, used: tuple[str, ...]) -> types.ModuleType:
        if module in self._visiting:  # modules may import each other
            return module
        self._visiting.add(module)
        members = {name: vars(module)[name] for name in used if name in vars(module)}
        replacements = {
            name: self._replacement(name, value, used) for name, value in members.items()
        }
        self._visiting.remove(module)
        changed = {name: new for name, new in replacements.items() if new is not members[name]}
        return _ModuleView(module, changed) if changed else module

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if function in self._copies:
            return self._copies[function]
        self._copies[function] = function  # for recursive functions
        names = tuple(_names(function.__code__))
        changed = {}
        if "dcnv3_tvm" in names:  # torch.ops.dcnv3_tvm.dcnv3
            self._calls_operator.add(function)
        for name in names:
            old = function.__globals__.get(name)
            if old is torch_op or old is torch_op.dcnv3:
                self._calls_operator.add(function)
                continue
            new = self._replacement(name, old, names)
            if new is not old:
                changed[name] = new
            elif isinstance(old, types.FunctionType) and old in self._calls_operator:
                self._calls_operator.add(function)
        cells, cells_changed = self._closure(function)
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
        self._copies[function] = result
        return result

    def _closure(
        self, function: types.FunctionType
    ) -> tuple[tuple[types.CellType, ...] | None, bool]:
        """Copy the closure: a decorator holds the decorated method in a cell."""
        if function.__closure__ is None:
            return None, False
        cells, changed = [], False
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            try:
                old = cell.cell_contents
            except ValueError:  # the variable is not assigned yet
                cells.append(cell)
                continue
            new = self._replacement(name, old, ())
            changed = changed or new is not old
            if isinstance(old, types.FunctionType) and old in self._calls_operator:
                self._calls_operator.add(function)
            cells.append(cell if new is old else types.CellType(new))
        return tuple(cells), changed


class _ModuleView(types.ModuleType):
    """A Python module with some names replaced."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _callables(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the methods of a module, bound, and the callables among its attributes."""
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
    """Yield the global and attribute names in a function, including nested functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _may_hold_dcnv3(module: str | None) -> bool:
    return module is None or module.split(".")[0] not in _WITHOUT_DCNV3
