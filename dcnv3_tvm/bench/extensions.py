"""The published CUDA extensions, where a user has installed them. None is built here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv3_tvm.bench.runner import first_line
from dcnv3_tvm.pytorch.operator import schema
from dcnv3_tvm.spec import DCNv3Params

_NAME: Final = "dcnv3_tvm_bench::dcnv3_extension"
_IMAGES_AT_ONCE: Final = 256
_PADDED: Final = 8


@dataclasses.dataclass(frozen=True)
class Extension:
    """A published extension.

    Parameters
    ----------
    name : str
        What the report calls it.
    module : str
        What is imported.
    function : str
        What is called of it.
    prepare : callable
        ``prepare(function, x, offset, mask, params)`` brings the inputs into its form and
        returns the call to be timed.
    """

    name: str
    module: str
    function: str
    prepare: Callable[[Any, Tensor, Tensor, Tensor, DCNv3Params], Callable[[], Tensor]]

    @property
    def loaded(self) -> Any:
        """The function; raises what its import raises."""
        return getattr(importlib.import_module(self.module), self.function)

    @property
    def absence(self) -> str | None:
        """Why it cannot be used; None where it can."""
        try:
            _ = self.loaded
        except Exception as error:
            # Built for another PyTorch it may fail in any way.
            return f"not importable: {first_line(error)}"
        return None


def _dcnv3(
    function: Any, x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params
) -> Callable[[], Tensor]:
    arguments = (
        *(x, offset, mask),
        *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
        *(params.group, x.shape[-1] // params.group, params.offset_scale, _IMAGES_AT_ONCE),
    )
    return functools.partial(_with_or_without_center, function, arguments, params.remove_center)


def _with_or_without_center(function: Any, arguments: tuple[Any, ...], remove: bool) -> Tensor:
    """Call it; version 1.0 knows no `remove_center`."""
    try:
        result: Tensor = function(*arguments, int(remove))
    except TypeError:
        if remove:
            raise
        result = function(*arguments)
    return result


def packed(offset: Tensor, mask: Tensor, group: int) -> Tensor:
    """Bring offsets and mask into the one tensor DCNv4 takes.

    It holds, group by group, the offsets of all points and then their masks; its channels are
    filled up to a multiple of eight.
    """
    lead = offset.shape[:3]
    groups = [tensor.reshape(*lead, group, -1) for tensor in (offset, mask)]
    together = torch.cat(groups, dim=-1).flatten(3)
    return F.pad(together, (0, -together.shape[-1] % _PADDED)).contiguous()


def _dcnv4(
    function: Any, x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params
) -> Callable[[], Tensor]:
    # It normalises no mask: with one that is ready, it computes what DCNv3 does.
    return functools.partial(
        function.apply,
        *(x, packed(offset, mask, params.group)),
        *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
        *(params.group, x.shape[-1] // params.group, params.offset_scale, _IMAGES_AT_ONCE),
        int(params.remove_center),
    )


DCNV3: Final = Extension("DCNv3 extension", "DCNv3", "dcnv3_forward", _dcnv3)
"""OpenGVLab/InternImage, ``ops_dcnv3``."""

DCNV4: Final = Extension("DCNv4 extension", "DCNv4.functions.dcnv4_func", "DCNv4Function", _dcnv4)
"""OpenGVLab/DCNv4, ``DCNv4_op``: another operator than DCNv3, which here computes the same."""

EXTENSIONS: Final = (DCNV3, DCNV4)
"""All of them."""


def sample(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    """Call DCNv3's extension as an operator of PyTorch, which ``torch.compile`` does not break at.

    For `dcnv3_tvm.bench.sampling.sampling_by`.
    """
    result: Tensor = torch.ops.dcnv3_tvm_bench.dcnv3_extension(x, offset, mask, **params.keywords())
    return result


def _run(x: Tensor, offset: Tensor, mask: Tensor, **params: Any) -> Tensor:
    x, offset, mask = x.contiguous(), offset.contiguous(), mask.contiguous()
    return DCNV3.prepare(DCNV3.loaded, x, offset, mask, DCNv3Params(**params))()


def _shape(x: Tensor, offset: Tensor, _mask: Tensor, **_: Any) -> Tensor:
    return x.new_empty(*offset.shape[:3], x.shape[-1])


def _register() -> None:
    # The registry of operators belongs to the process, and outlives a reload of this module.
    if hasattr(torch.ops.dcnv3_tvm_bench, "dcnv3_extension"):
        return
    torch.library.define(_NAME, schema())
    torch.library.impl(_NAME, ("cpu", "cuda"))(_run)
    torch.library.register_fake(_NAME)(_shape)


_register()
