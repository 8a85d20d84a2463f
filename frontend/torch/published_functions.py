"""Find the functions that bear a published name, and run them on the CPU."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from dcnv3_tvm.frontend.torch.published_call import CORE_NAME, FUNCTION_NAME, PublishedCall
from dcnv3_tvm.imported_model import SamplingCheck
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.pytorch import operator as torch_op

_EXTENSION: Final = "DCNv3"
"""Python module of the published CUDA extension."""

_EXTENSION_FUNCTION: Final = "dcnv3_forward"


class PublishedFunction:
    """A function with a published name.

    Parameters
    ----------
    function : function
        The function object, whose code is exchanged.
    name : str
        For messages.
    has_context : bool
        Whether it is the forward of the autograd function, which has a context as first argument
        and ``im2col_step`` before ``remove_center``.
    """

    def __init__(self, function: types.FunctionType, name: str, *, has_context: bool) -> None:
        self.function = function
        self.name = name
        self.has_context = has_context
        self.original = _copy(function)
        self.traced = _with_extension(function, call_operator) if has_context else self.original
        self.on_cpu = _with_extension(function, _reference) if has_context else self.original
        self._signature = inspect.signature(self.original)

    def parse(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> PublishedCall | None:
        """Return a call with the published arguments, otherwise None."""
        return PublishedCall.parse(self._signature, arguments, keywords, has_step=self.has_context)

    def sample(
        self,
        call: PublishedCall,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        *tensors: Tensor,
    ) -> Any:
        """Repeat a call on the CPU with other tensors."""
        new: dict[int, Any] = dict(
            zip(map(id, (call.x, call.offset, call.mask)), tensors, strict=True)
        )
        if self.has_context and call.owner is not None:
            new[id(call.owner)] = _Context()
        return self.on_cpu(
            *(new.get(id(each), each) for each in arguments),
            **{name: new.get(id(each), each) for name, each in keywords.items()},
        )

    def judge(self, measure: Callable[[], float], tolerance: float) -> SamplingCheck:
        """Decide from its error on random inputs whether the function may be replaced."""
        try:
            error = measure()
        except Exception as failure:  # raised by the user's function
            reason = f"running it on the CPU failed: {type(failure).__name__}: {failure}"
            # Only the CUDA function is expected to fail.
            return SamplingCheck(self.name, replaced=self.has_context, reason=reason)
        return SamplingCheck(self.name, replaced=error <= tolerance, error=error)


class _Context:
    """Stands in for the context of an autograd function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_arguments: None


def published_cores() -> Iterator[PublishedFunction]:
    """Find the functions that have the name of the published fallback, or are imported under it."""
    functions = [
        each
        for each in gc.get_objects()
        if type(each) is types.FunctionType and each.__name__ == CORE_NAME
    ]
    for module in list(sys.modules.values()):
        value = vars(module).get(CORE_NAME) if isinstance(module, types.ModuleType) else None
        while isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, types.FunctionType) and value not in functions:
            functions.append(value)
    for function in functions:
        yield PublishedFunction(
            function, f"{function.__module__}.{function.__qualname__}", has_context=False
        )


def published_autograd_functions() -> Iterator[PublishedFunction]:
    """Find the forwards of the classes that have the name of the published autograd function."""
    for cls in _subclasses(torch.autograd.Function):
        forward = vars(cls).get("forward")
        forward = getattr(forward, "__func__", forward)
        if cls.__name__ == FUNCTION_NAME and isinstance(forward, types.FunctionType):
            yield PublishedFunction(
                forward, f"{cls.__module__}.{cls.__qualname__}", has_context=True
            )


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def _copy(function: types.FunctionType, names: dict[str, Any] | None = None) -> types.FunctionType:
    """Copy a function, with some of its global names bound to other objects."""
    copied = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names} if names else function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _with_extension(
    forward: types.FunctionType, compute: Callable[[PublishedCall], Tensor]
) -> types.FunctionType:
    """Copy the forward of an autograd function, with the CUDA extension computed by `compute`."""

    def extension(*arguments: Any) -> Tensor:
        call = PublishedCall.parse(inspect.signature(extension), arguments, {}, has_step=True)
        if call is None:
            raise TypeError(f"{_EXTENSION}.{_EXTENSION_FUNCTION} got other arguments")
        return compute(call)

    # custom_fwd of torch.amp wraps the forward.
    while forward.__globals__["__name__"].startswith("torch.") and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if _EXTENSION_FUNCTION not in forward.__code__.co_names:
        return _copy(forward)
    stand_in = types.SimpleNamespace(**{_EXTENSION_FUNCTION: extension})
    return _copy(forward, {_EXTENSION: stand_in})


def call_operator(call: PublishedCall) -> Tensor:
    """Compute a call by the operator."""
    return torch_op.dcnv3(call.x, call.offset, call.mask, **call.params.keywords())


def _reference(call: PublishedCall) -> Tensor:
    x, offset, mask = (each.double().numpy() for each in (call.x, call.offset, call.mask))
    result = dcnv3_reference(x, offset, mask, call.spec(*call.x.shape[:3]))
    return torch.from_numpy(result).to(call.x.dtype)
