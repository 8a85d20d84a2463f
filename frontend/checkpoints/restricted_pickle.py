"""A pickle module for ``torch.load`` that builds tensors and plain values only.

``weights_only=True`` rejects a whole file because of one unknown object, such as a trainer's
configuration. This module replaces every such object by an empty placeholder instead. Of the
classes and functions that a file names, only the few that build tensors are imported and called.
"""

from __future__ import annotations

import collections
import io
import pickle
import types
from typing import Any, Final

import torch

from dcnv3_tvm.errors import CheckpointError

_BUILDERS: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    },
}

_MALICIOUS_MODULES: Final = ("os", "posix", "nt", "sys", "subprocess")
_MALICIOUS_BUILTINS: Final = ("eval", "exec", "compile", "__import__")


def is_malicious(module: str, name: str) -> bool:
    """Whether no checkpoint has a legitimate reason to name this function."""
    package = module.partition(".")[0]
    return package in _MALICIOUS_MODULES or (
        package in ("builtins", "__builtin__") and name in _MALICIOUS_BUILTINS
    )


def make_pickle_module(replaced: list[str]) -> types.ModuleType:
    """Return a module to pass to ``torch.load`` as ``pickle_module``.

    Parameters
    ----------
    replaced : list of str
        Receives the names of the classes and functions replaced by placeholders.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _BUILDERS:
                return _BUILDERS[module, name]
            full_name = f"{module}.{name}"
            if is_malicious(module, name):
                raise CheckpointError(f"the file asks to run {full_name}")
            if full_name not in replaced:
                replaced.append(full_name)
            return type(name, (_Placeholder,), {})

    def load(file: io.BufferedIOBase, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = types.ModuleType("restricted_pickle")
    module.__dict__.update(Unpickler=Unpickler, load=load)
    return module


class _Placeholder:
    """Replaces an object of an unknown class; accepts and drops its state."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Placeholder:
        return self

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...

    def add(self, _item: Any) -> None: ...
