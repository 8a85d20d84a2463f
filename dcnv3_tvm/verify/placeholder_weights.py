"""Variants with placeholder weights, to look at their kernels without computing anything."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.transform.storage_gpu import MANY_SUMS

_DEEP: Final = MANY_SUMS // 2 + 1
"""Blocks, of two residual sums each, from which on the GPU lowering keeps the residual stream of a
pre-norm stage in float32."""


def placeholder_model(
    variant: str, *, features_only: bool = False, shorten: bool = False
) -> InternImage:
    """Build a variant whose matrices are zero and whose vectors are one.

    Zero matrices are lazily allocated by the operating system, so the largest variants fit too.

    Parameters
    ----------
    variant : str
        Name of a variant, see `dcnv3_tvm.frontend.list_models`.
    features_only : bool
        Build the feature pyramid without a head.
    shorten : bool
        Leave out blocks that repeat the kernels of others: the model has the same set of kernels
        and is imported several times faster.
    """
    model = frontend.create_model(variant, features_only=features_only, device="meta")
    if shorten:
        config = model.config
        pre_norm = not (config.post_norm or config.res_post_norm)
        depths = [_DEEP if pre_norm and depth >= _DEEP else 1 for depth in config.depths]
        extra_norms = (0,) if config.level2_post_norm_block_ids else ()
        with torch.device("meta"):
            model = InternImage(
                dataclasses.replace(
                    config,
                    depths=(depths[0], depths[1], depths[2], depths[3]),
                    level2_post_norm_block_ids=extra_norms,
                )
            )
    weights = {}
    for name, value in model.state_dict().items():
        fill = np.ones if value.ndim == 1 else np.zeros
        weights[name] = torch.from_numpy(fill(tuple(value.shape), np.float32))
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
