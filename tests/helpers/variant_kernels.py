"""The kernels of a released variant, as the pipeline makes them."""

from __future__ import annotations

import functools

from tvm.target import Target

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.cases import encoder_case
from dcnv3_tvm.compiler.kernel_listing import CalledKernel, model_kernels
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.verify.placeholder_weights import placeholder_model


def variant_kernels(
    variant: str,
    target: Target,
    dtype: str,
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    scheduled: bool = True,
) -> list[CalledKernel]:
    """List the kernels of a variant with its own widths and as few blocks as possible.

    Parameters
    ----------
    variant, batch, size
        As in `dcnv3_tvm.bench.cases.encoder_case`.
    target, dtype, scheduled
        As in `dcnv3_tvm.compiler.kernel_listing.model_kernels`.
    """
    imported = _imported(variant, batch, size)
    return model_kernels(imported, target, dtype=dtype, scheduled=scheduled)


# Consecutive tests ask for the same model, for several targets.
@functools.lru_cache(maxsize=1)
def _imported(variant: str, batch: int, size: tuple[int, int] | None) -> ImportedModel:
    case = encoder_case(variant, batch=batch, size=size)
    model = placeholder_model(variant, shorten=True)
    return frontend.import_model(model, example=(batch, 3, *case.size), features="never")
