"""Repeat calls of the operator that passed all checks, with only those that may fail now."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, cast

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.kernel import Kernel
from dcnv3_tvm.runtime.library import tvm_ffi
from dcnv3_tvm.spec import DCNv3Spec

_LIMIT: Final = 256


@dataclasses.dataclass(frozen=True, slots=True)
class RepeatedCall:
    """A call that passed all checks.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, static.
    kernel : Kernel
        The operator's kernel, for a CPU or a GPU.
    allocate : callable
        Returns a new tensor for the result, from a contiguous x.
    """

    spec: DCNv3Spec
    kernel: Kernel
    allocate: Callable[[Any], Any]

    def run(self, x: Any, offset: Any, mask: Any, out: Any) -> Any | None:
        """Run the operator on tensors in CPU memory that need no copy.

        Parameters
        ----------
        x : object
            Of the kind, dtype and shape of the call that is repeated.
        offset, mask, out : object
            As the caller passed them.

        Returns
        -------
        Same kind as `x` or None
            The result, which is `out` unless that is None. None, with nothing computed, where the
            call with all checks is needed, which copies a tensor or says what is wrong.
        """
        if self.kernel.on_gpu or type(offset) is not type(x) or type(mask) is not type(x):
            return None
        try:
            if not tensors.are_plain(x, offset, mask):
                return None
            if out is None:
                out = self.allocate(x)
                arguments: Sequence[Any] = (x, offset, mask, out)
            elif type(out) is not type(x) or getattr(out, "requires_grad", False):
                return None
            else:
                arguments = [tvm_ffi().from_dlpack(each) for each in (x, offset, mask, out)]
                if tensors.overlap(arguments[3], arguments[:3], DTYPE_BYTES[self.spec.dtype]):
                    return None
            self.kernel.run_on_cpu(arguments)
        except (BufferError, RuntimeError, TypeError, ValueError):
            # The kernel's own checks, before it computes: of shapes, dtypes, memory, devices.
            return None
        return out


class RepeatedCalls:
    """Calls that passed all checks, by their parameters and by kind, dtype and shape of x."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, RepeatedCall] = {}

    def find(self, x: Any, parameters: Hashable = None) -> RepeatedCall | None:
        """Return an earlier call with such arguments, or None."""
        try:
            return self._calls.get((type(x), x.dtype, x.shape, parameters))
        except (AttributeError, RuntimeError, TypeError):
            return None  # Not a tensor, a tensor without shape, a parameter that is no key.

    def keep(self, spec: DCNv3Spec, kernel: Kernel, x: Any, parameters: Hashable = None) -> None:
        """Keep a call that passed all checks, to be repeated."""
        call = RepeatedCall(spec, kernel, _allocator(spec, x))
        if len(self._calls) >= _LIMIT:
            self._calls.clear()
        try:
            self._calls[type(x), x.dtype, x.shape, parameters] = call
        except TypeError:
            return  # A parameter is no key.


def _allocator(spec: DCNv3Spec, x: Any) -> Callable[[Any], Any]:
    shape = cast("tuple[int, ...]", spec.output_shape)
    torch = sys.modules.get("torch")
    if torch is not None and type(x) is torch.Tensor and tensors.shape_of(x) == shape:
        empty_like: Callable[[Any], Any] = torch.empty_like  # In a third of the time.
        return empty_like
    return lambda like: tensors.empty_like(like, shape)
