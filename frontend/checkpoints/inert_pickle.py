"""A pickle module for ``torch.load`` that builds tensors and plain values, and nothing else.

``weights_only=True`` refuses a whole file for one object it does not know, such as a trainer's
configuration. Here such an object becomes an empty placeholder instead: whatever class or function
the file names, only the few that build tensors are ever looked up, so nothing of the file's choice
is imported or called.
"""

from __future__ import annotations

import collections
import io
import pickle
import types
from typing import Any, Final

import torch

from dcnv3_tvm.errors import CheckpointError

HOSTILE_MODULES: Final = ("os", "posix", "nt", "sys", "subprocess")
HOSTILE_BUILTINS: Final = ("eval", "exec", "compile", "__import__")

_BUILDERS: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_parameter",
        )
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    },
}


def is_hostile(module: str, name: str) -> bool:
    """Whether the name is one that no trainer has a reason to store."""
    top = module.partition(".")[0]
    return top in HOSTILE_MODULES or (
        top in ("builtins", "__builtin__") and name in HOSTILE_BUILTINS
    )


class Placeholder:
    """Takes the place of an object; accepts and forgets what is put into it."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Placeholder:
        """Ignore the arguments."""
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> Placeholder:
        """Return another one's stand-in: itself."""
        return self

    def append(self, _item: Any) -> None:
        """Forget the item."""

    def extend(self, _items: Any) -> None:
        """Forget the items."""

    def add(self, _item: Any) -> None:
        """Forget the item."""


def make_pickle_module(replaced: list[str]) -> types.ModuleType:
    """Return what to pass to ``torch.load`` as ``pickle_module``.

    Parameters
    ----------
    replaced : list of str
        Filled while reading with the names that placeholders stand for.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _BUILDERS:
                return _BUILDERS[module, name]
            full_name = f"{module}.{name}"
            if is_hostile(module, name):
                raise CheckpointError(f"the file asks to run {full_name}")
            if full_name not in replaced:
                replaced.append(full_name)
            return type(name, (Placeholder,), {})

    def load(file: io.BufferedIOBase, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = types.ModuleType("inert_pickle")
    module.__dict__.update(Unpickler=Unpickler, load=load)
    return module
