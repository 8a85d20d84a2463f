"""The published CUDA extensions DCNv3 and DCNv4, if the user has installed them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv3_tvm.bench.report import failure_text
from dcnv3_tvm.pytorch.registration import schema
from dcnv3_tvm.spec import DCNv3Params

_NAME: Final = "dcnv3_tvm_bench::dcnv3_extension"
_IM2COL_STEP: Final = 256
_CHANNEL_MULTIPLE: Final = 8


@dataclasses.dataclass(frozen=True)
class Extension:
    """A published extension.

    Parameters
    ----------
    name : str
        Name in the report.
    module, function : str
        Function to call and the module that defines it.
    prepare : callable
        ``prepare(function, x, offset, mask, params)`` converts the inputs and returns the call to
        be timed.
    """

    name: str
    module: str
    function: str
    prepare: Callable[[Any, Tensor, Tensor, Tensor, DCNv3Params], Callable[[], Tensor]]

    @property
    def loaded(self) -> Any:
        """The function; importing it may raise anything."""
        return getattr(importlib.import_module(self.module), self.function)

    @property
    def import_failure(self) -> str | None:
        """Why the extension cannot be imported; None if it can."""
        try:
            loaded = self.loaded
        except Exception as error:  # one built for another PyTorch may fail in any way
            return f"not importable: {failure_text(error)}"
        if str(loaded.__module__).startswith("dcnv3_tvm."):
            return "not installed: the module is the stand-in of dcnv3-tvm"
        return None


def _dcnv3(
    function: Any, x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params
) -> Callable[[], Tensor]:
    arguments = (
        *(x, offset, mask),
        *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
        *(params.group, x.shape[-1] // params.group, params.offset_scale, _IM2COL_STEP),
    )
    return functools.partial(_with_or_without_center, function, arguments, params.remove_center)


def dcnv3_backward(params: DCNv3Params) -> Callable[..., list[Tensor]]:
    """Return the backward pass of the DCNv3 extension, of (grad, x, offset, mask)."""
    function = importlib.import_module(DCNV3.module).dcnv3_backward

    def compute(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor) -> list[Tensor]:
        arguments = (
            *(x, offset, mask),
            *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
            *(params.group, x.shape[-1] // params.group, params.offset_scale, grad, _IM2COL_STEP),
        )
        return list(_with_or_without_center(function, arguments, params.remove_center))

    return compute


def _with_or_without_center(function: Any, arguments: tuple[Any, ...], remove: bool) -> Any:
    """Call the extension; version 1.0 does not take `remove_center`."""
    try:
        result = function(*arguments, int(remove))
    except TypeError:
        if remove:
            raise
        result = function(*arguments)
    return result


def pack_dcnv4(offset: Tensor, mask: Tensor, group: int) -> Tensor:
    """Pack offsets and mask into the single tensor that DCNv4 takes.

    Each group holds the offsets of all its points, then their mask; channels are padded to a
    multiple of eight.
    """
    lead = offset.shape[:3]
    groups = [tensor.reshape(*lead, group, -1) for tensor in (offset, mask)]
    together = torch.cat(groups, dim=-1).flatten(3)
    return F.pad(together, (0, -together.shape[-1] % _CHANNEL_MULTIPLE)).contiguous()


def _dcnv4(
    function: Any, x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params
) -> Callable[[], Tensor]:
    # DCNv4 does not normalise the mask; given DCNv3's softmax it computes the same result.
    return functools.partial(
        function.apply,
        *(x, pack_dcnv4(offset, mask, params.group)),
        *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
        *(params.group, x.shape[-1] // params.group, params.offset_scale, _IM2COL_STEP),
        int(params.remove_center),
    )


DCNV3: Final = Extension("DCNv3 extension", "DCNv3", "dcnv3_forward", _dcnv3)
"""OpenGVLab/InternImage, ``ops_dcnv3``."""

DCNV4: Final = Extension("DCNv4 extension", "DCNv4.functions.dcnv4_func", "DCNv4Function", _dcnv4)
"""OpenGVLab/DCNv4, ``DCNv4_op``."""

EXTENSIONS: Final = (DCNV3, DCNV4)


def extension_sampling(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    """Call the DCNv3 extension as a PyTorch operator, so that ``torch.compile`` does not break."""
    result: Tensor = torch.ops.dcnv3_tvm_bench.dcnv3_extension(x, offset, mask, **params.keywords())
    return result


def _run(x: Tensor, offset: Tensor, mask: Tensor, **params: Any) -> Tensor:
    x, offset, mask = x.contiguous(), offset.contiguous(), mask.contiguous()
    return DCNV3.prepare(DCNV3.loaded, x, offset, mask, DCNv3Params(**params))()


def _shape(x: Tensor, offset: Tensor, _mask: Tensor, **_: Any) -> Tensor:
    return x.new_empty(*offset.shape[:3], x.shape[-1])


def _register() -> None:
    # PyTorch's operator registry outlives a reload of this module.
    if hasattr(torch.ops.dcnv3_tvm_bench, "dcnv3_extension"):
        return
    torch.library.define(_NAME, schema(("x", "offset", "mask"), 1))
    torch.library.impl(_NAME, ("cpu", "cuda"))(_run)
    torch.library.register_fake(_NAME)(_shape)


_register()
