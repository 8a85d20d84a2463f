"""What a model can keep between calls: attributes, class attributes and global variables."""

from __future__ import annotations

import collections
import functools
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES: Final = sys.stdlib_module_names - {"__main__"} | {
    "dcnv3_tvm",
    "huggingface_hub",
    "mmcv",
    "mmengine",
    "numpy",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "tvm",
}
"""Packages whose variables, and the attributes of whose objects, are not searched."""

_NOT_STATE: Final = (nn.Module, type, types.BuiltinFunctionType, types.ModuleType)
"""Values that are not searched; each module of the model is searched by itself."""

_STANDARD: Final = frozenset(vars(nn.Module()))
"""Attributes of each module, most of which are empty dictionaries of hooks."""

_MOST_ITEMS: Final = 10_000
"""Longer containers are data."""

_MOST_LEVELS: Final = 20
"""Objects in deeper containers are not searched."""

_MOST_BYTES: Final = 2**20
"""Larger arrays are data."""

_RANDOM: Final[dict[str, Callable[[], Any]]] = {
    "Python's random numbers": random.getstate,
    "NumPy's random numbers": np.random.get_state,
}


class ModelState:
    """The state of a model, which can be read and restored.

    Parameters
    ----------
    model : nn.Module
        Its modules, their classes, the global variables of the packages that define these, and
        those of all packages that are not installed are searched.
    functions : sequence of function
        Searched in the same way.
    """

    def __init__(self, model: nn.Module, functions: Sequence[types.FunctionType] = ()) -> None:
        self._owners: dict[str, Any] = {}
        self._packages: set[str] = set()
        classes: dict[type, None] = {}
        for path, part in model.named_modules():
            self._owners[f"{path}." if path else ""] = part
            classes |= dict.fromkeys(type(part).__mro__)
        for cls in classes:
            if _package(cls) not in _LIBRARIES:
                self._owners[f"{cls.__qualname__}."] = cls
        self._functions = {f"{each.__qualname__}.": each for each in functions}
        self._packages = {_package(each) for each in (*classes, *functions)} | _own_packages()
        self._packages -= _LIBRARIES
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in self._packages and isinstance(module, types.ModuleType):
                self._owners[f"{name}."] = module
        self._saved: list[tuple[Any, Any]] = []
        self._read(self._saved)

    def read(self) -> dict[str, Any]:
        """Return all values by name: that of a tensor is `TensorValue`."""
        # Modes of PyTorch would intercept each access to a tensor.
        with torch._C.DisableTorchFunction():
            return self._read([]) | {name: repr(read()) for name, read in _RANDOM.items()}

    def restore(self) -> None:
        """Undo the changes since this object was made, except in tensors."""
        for container, saved in self._saved:
            _restore(container, saved)

    def _read(self, containers: list[tuple[Any, Any]]) -> dict[str, Any]:
        reader = _Reader(containers)
        for name, function in self._functions.items():
            reader.add(name, function, None)
        for prefix, owner in self._owners.items():
            namespace = dict(vars(owner))
            containers.append((owner, {**namespace}))
            if isinstance(owner, nn.Module):
                parts = [namespace.pop(name) for name in ("_buffers", "_modules", "_parameters")]
                containers += [(each, each.copy()) for each in parts]
                namespace |= {**owner._parameters, **owner._buffers}
            # Any object may be a global variable, but those of other packages are not the model's.
            packages = self._packages if isinstance(owner, types.ModuleType) else None
            for name, value in namespace.items():
                if not (name.startswith("__") or (name in _STANDARD and not value)):
                    reader.add(f"{prefix}{name}", value, packages)
        return reader.values


class TensorValue(tuple[int, int]):
    """Identity and version of a tensor."""

    __slots__ = ()


class _Reader:
    """Collects values by name, and copies of the containers that hold them."""

    def __init__(self, containers: list[tuple[Any, Any]]) -> None:
        self.values: dict[str, Any] = {}
        self._containers = containers
        self._seen: set[int] = set()

    def add(self, name: str, value: Any, packages: set[str] | None, depth: int = 0) -> None:
        """Add a value, or the values in a container, a function or an object.

        Only objects of `packages` are searched; None stands for all but `_LIBRARIES`.
        """
        if isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            self.values[name] = TensorValue((id(value), version))
        elif isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            self.values[name] = value
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.values[name] = str(value)
        elif isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES:
            self.values[name] = (value.shape, value.tobytes())
        elif id(value) not in self._seen and not isinstance(value, _NOT_STATE):
            self._seen.add(id(value))
            items = self._items(name, value, packages) if depth < _MOST_LEVELS else None
            if items is None:
                # Those that can be hashed are compared by value: torch.device, numpy.int64.
                self.values[name] = value if isinstance(value, Hashable) else id(value)
                return
            is_object = hasattr(value, "__dict__")
            for key, item in items:
                path = f"{name}.{key}" if is_object else f"{name}[{key!r}]"
                self.add(path, item, packages, depth + 1)

    def _items(
        self, name: str, value: Any, packages: set[str] | None
    ) -> list[tuple[Any, Any]] | None:
        """Return what a container, a function or an object holds; None if it is not searched."""
        if isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)):
            if len(value) > _MOST_ITEMS:
                return None
            if isinstance(value, dict):
                self._containers.append((value, dict(value)))
                return list(value.items())
            if not isinstance(value, (tuple, frozenset)):
                self._containers.append((value, list(value)))
            self.values[f"len({name})"] = len(value)
            return list(enumerate(value))
        if isinstance(value, types.MethodType):
            return [("__func__", value.__func__)]
        if isinstance(value, (staticmethod, classmethod)):
            return [("__func__", value.__func__)]
        if isinstance(value, functools.partial):
            return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
        package = _package(value if isinstance(value, types.FunctionType) else type(value))
        if not hasattr(value, "__dict__") or (
            package in _LIBRARIES if packages is None else package not in packages
        ):
            return None
        if isinstance(value, types.FunctionType):
            return list(_variables(value, self._containers).items())
        self._containers.append((value, dict(vars(value))))
        return list(vars(value).items())


def _variables(function: types.FunctionType, containers: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the variables of enclosing functions and the defaults that a function holds."""
    found = {"__defaults__": function.__defaults__, "__kwdefaults__": function.__kwdefaults__}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            continue
        containers.append((cell, found[name]))
    return found | vars(function)


def _restore(container: Any, saved: Any) -> None:
    if isinstance(container, types.CellType):
        container.cell_contents = saved
        return
    if isinstance(container, (list, set, collections.deque)):
        if [id(each) for each in container] != [id(each) for each in saved]:
            container.clear()
            for each in saved:
                (container.add if isinstance(container, set) else container.append)(each)
        return
    is_dict = isinstance(container, dict)
    current = dict(container) if is_dict else dict(vars(container))
    for name in current.keys() - saved.keys():
        if is_dict:
            del container[name]
        else:
            delattr(container, name)
    for name, value in saved.items():
        if current.get(name) is not value:
            if is_dict:
                container[name] = value
            else:
                setattr(container, name, value)


def _own_packages() -> set[str]:
    """Return the packages that are loaded and not installed, among them ``__main__``."""
    installed = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    files = {
        name: str(getattr(module, "__file__", None) or "")
        for name, module in list(sys.modules.items())
        if "." not in name
    }
    own = {name for name, file in files.items() if file and not any(p in file for p in installed)}
    return own | {"__main__"}


def _package(value: Any) -> str:
    return str(value.__module__).split(".")[0]
