"""Replace the published sampling functions by the operator while a model is traced.

A function is found by its name, ``dcnv3_core_pytorch`` or ``DCNv3Function``, but replaced only in
calls for which it computes DCNv3: the first call with new parameters is compared with the reference
implementation. A function that computes something else is traced as it is.
"""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import torch
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.model_state import ModelState
from dcnv3_tvm.frontend.torch.published_call import PublishedCall
from dcnv3_tvm.frontend.torch.published_functions import (
    PublishedFunction,
    call_operator,
    published_autograd_functions,
    published_cores,
)
from dcnv3_tvm.frontend.torch.verify_sampling import (
    outside_of_tracing,
    sampling_error,
    tolerance,
)
from dcnv3_tvm.imported_model import SamplingCheck


class SamplingReached(BaseException):
    """Ends a call that only finds out whether a module calls a published sampling function.

    It is not an `Exception`, because forwards catch those to select another implementation.
    """


class SamplingReplacement:
    """Context in which the published sampling functions call the operator, in this thread only.

    The code of each function is exchanged, and restored at the end. So a call reaches the
    replacement however the model refers to the function: by an alias, through ``super()``, from a
    decorator or by an import inside of a forward.
    """

    def __init__(self) -> None:
        self.stop_at_sampling = False
        self._checks: dict[Any, SamplingCheck] = {}
        self._codes: list[tuple[types.FunctionType, types.CodeType]] = []
        self._thread = threading.get_ident()

    @property
    def checks(self) -> tuple[SamplingCheck, ...]:
        """What was found for each function that was called: the largest error of its calls."""
        worst: dict[Any, SamplingCheck] = {}
        for check in self._checks.values():
            key = (check.source, check.replaced, check.reason)
            if key not in worst or (check.error or 0.0) > (worst[key].error or 0.0):
                worst[key] = check
        return tuple(worst.values())

    def __enter__(self) -> SamplingReplacement:
        functions: list[PublishedFunction] = [*published_cores(), *published_autograd_functions()]
        for function in functions:
            self._exchange(function)
        return self

    def __exit__(self, *_: object) -> None:
        for function, code in reversed(self._codes):
            function.__code__ = code
        self._codes.clear()

    def _exchange(self, published: PublishedFunction) -> None:
        def call(*arguments: Any, **keywords: Any) -> Any:
            target: Any = "target"
            return target(*arguments, **keywords)

        function = published.function
        # A constant, because the code will see the globals of the user's module.
        target = functools.partial(self._call, published)
        code = call.__code__
        self._codes.append((function, function.__code__))
        function.__code__ = code.replace(
            co_consts=tuple(target if each == "target" else each for each in code.co_consts),
            # The number of free variables of a function cannot change.
            co_freevars=function.__code__.co_freevars,
        )

    def _call(self, published: PublishedFunction, *arguments: Any, **keywords: Any) -> Any:
        """Compute a call of an exchanged function."""
        if threading.get_ident() != self._thread:
            return published.original(*arguments, **keywords)
        if self.stop_at_sampling:
            raise SamplingReached
        call = published.parse(arguments, keywords)
        if call is None:
            self._checks[published] = SamplingCheck(
                published.name, replaced=False, reason="its arguments are not the published ones"
            )
        elif not call.has_matching_sizes():
            if published.has_context or not _runs(published, call, arguments, keywords):
                raise _other_sizes(published, call)
            self._checks[published] = SamplingCheck(
                published.name, replaced=False, reason="offset does not have the output's size"
            )
        elif self._check(published, call, arguments, keywords).replaced:
            return call_operator(call)
        return published.traced(*arguments, **keywords)

    def _check(
        self,
        published: PublishedFunction,
        call: PublishedCall,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> SamplingCheck:
        # The context of an autograd function is a new object in each call.
        owner = None if published.has_context else id(call.owner)
        key = (published, owner, call.params, call.size, int(call.x.shape[-1]))
        if key not in self._checks:
            sample = functools.partial(published.sample, call, arguments, keywords)
            measure = functools.partial(sampling_error, sample, call)
            state = ModelState(nn.Module(), [published.original])
            self._checks[key] = published.judge(
                functools.partial(outside_of_tracing, measure), tolerance(call)
            )
            state.restore()
        return self._checks[key]


def _other_sizes(published: PublishedFunction, call: PublishedCall) -> ModelImportError:
    params = call.params
    sizes = {name: tuple(getattr(call, name).shape) for name in ("x", "offset", "mask")}
    return ModelImportError(
        "offset and mask do not have the size of the sampled map",
        got=", ".join(f"{name} {size}" for name, size in sizes.items())
        + f" for kernel_size={params.kernel_size}, stride={params.stride}, pad={params.pad}, "
        f"dilation={params.dilation} in {published.name}",
        allowed="offset and mask of shape (N, {}, {}, channels)".format(*call.output_size),
        hint="The published CUDA code does not check this and reads the offsets of other pixels, "
        "so that weights trained with it have no well-defined result. Compute offset and mask from "
        "a map of the output's size: give the depthwise convolution in front of them the stride of "
        "the module, or a kernel and padding that keep the size.",
    )


def _runs(
    published: PublishedFunction,
    call: PublishedCall,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> bool:
    """Whether a function accepts tensors of the sizes of a call."""
    shapes = [tuple(tensor.shape) for tensor in (call.x, call.offset, call.mask)]

    def run() -> None:
        published.sample(call, arguments, keywords, *(torch.zeros(shape) for shape in shapes))

    try:
        outside_of_tracing(run)
    except Exception:  # raised by the user's function
        return False
    return True
