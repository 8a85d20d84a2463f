"""Check that kernels which decide a model's time got a schedule of their own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Final

from tvm import tirx

from dcnv3_tvm.compiler.kernel_work import MATMUL_KINDS
from dcnv3_tvm.errors import CompileError, DCNv3Warning
from dcnv3_tvm.op.expr import KERNEL_ATTR, static
from dcnv3_tvm.schedules import ScheduledKernel

_FALLBACK: Final = "fallback"

_STOCK: Final = re.compile(r"matmul|conv\d|dense|einsum")
"""Names that TVM gives its own kernels of matmuls and convolutions."""


def check_rules(kernels: Mapping[str, ScheduledKernel], *, on_gpu: bool) -> None:
    """Check the rules of matmuls and convolutions.

    The fallback rule computes one output a thread: on a GPU without tensor cores.

    Parameters
    ----------
    kernels : dict of str to ScheduledKernel
        How each kernel was scheduled.
    on_gpu : bool
        Whether they run on a GPU.

    Raises
    ------
    CompileError
        If a matmul or convolution of this package got the fallback rule.

    Warns
    -----
    DCNv3Warning
        If one of TVM got it on a GPU, as that of two activations in a user's head, unless it
        multiplies by a vector.
    """
    slow = {name: found for name, found in kernels.items() if found.rule == _FALLBACK}
    stock = []
    for name, found in slow.items():
        kind = (found.function.attrs or {}).get(KERNEL_ATTR)
        if kind is None and on_gpu and _STOCK.search(name) and not _has_one_row(found.function):
            stock.append(name)
        elif kind in MATMUL_KINDS:
            raise CompileError(
                "a matmul or convolution has no schedule of its own",
                got=f"{name}: {found.refusals.get(str(kind), 'no rule applies')}",
                hint="This is a defect of dcnv3-tvm; please report the model and the target.",
            )
    if stock:
        warnings.warn(
            f"these kernels of the model run without tensor cores: {', '.join(stock)}",
            DCNv3Warning,
            stacklevel=4,
        )


def _has_one_row(function: tirx.PrimFunc) -> bool:
    """Return whether the result is of vectors, so that memory bounds the kernel anyway."""
    shape = function.params[-1].shape
    return any(static(size) == 1 for size in shape[-2:])
