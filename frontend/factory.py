"""Create an InternImage by name, with or without a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.checkpoints.containers import CheckpointTensors
from dcnv3_tvm.frontend.checkpoints.layouts import has_layer_scale
from dcnv3_tvm.frontend.checkpoints.load import load_tensors
from dcnv3_tvm.frontend.checkpoints.read import read_tensors
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import model_config

AUTO: Final = "auto"


def create_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    layer_scale: float | Literal["auto"] | None = AUTO,
    use_ema: bool = False,
    ignore_objects: bool = False,
    allow_pickle: bool = False,
    device: str | torch.device = "cpu",
) -> InternImage:
    """Create an InternImage.

    Parameters
    ----------
    name : str
        One of `dcnv3_tvm.frontend.list_models`.
    checkpoint : str, Path or None
        Weights in any layout that `load_checkpoint` supports. None initialises them as published:
        such a model is untrained, and its DCNv3 modules sample the regular grid.
    num_classes : int or None
        Number of logits; 0 for pooled features; None for the variant's default (1000).
    features_only : bool
        Return feature maps instead of logits; the model has no head.
    out_indices : sequence of int
        Stages (0 to 3) whose feature maps are returned with `features_only`.
    layer_scale : float, None or "auto"
        Initial layer scale; None for no layer scale. ``"auto"`` follows the checkpoint; without
        one it is the published value for classification, or with `features_only` for detection.
    use_ema, ignore_objects, allow_pickle : bool
        As in `load_checkpoint`.
    device : str or torch.device
        Device of the weights; ``"meta"`` allocates none.

    Returns
    -------
    InternImage
        In evaluation mode, with frozen parameters, as compiling needs it; to train, call
        ``model.train().requires_grad_()``.

    Raises
    ------
    InvalidArgumentError
        If the name or an option is unknown.
    CheckpointError
        If the checkpoint cannot be read or does not fit the model exactly.

    Examples
    --------
    >>> from dcnv3_tvm import frontend
    >>> model = frontend.create_model("internimage_t", device="meta")
    >>> sum(parameter.numel() for parameter in model.parameters())
    29918424
    """
    config = model_config(name)
    content = None
    if checkpoint is not None:
        content = read_tensors(
            checkpoint, use_ema=use_ema, ignore_objects=ignore_objects, allow_pickle=allow_pickle
        )
    config = dataclasses.replace(
        config,
        num_classes=config.num_classes if num_classes is None else num_classes,
        features_only=features_only,
        out_indices=tuple(out_indices),
        layer_scale=_layer_scale(config, layer_scale, features_only, content),
    )
    # With a checkpoint, the model takes over the loaded tensors and allocates none itself.
    with torch.device("meta" if content is not None else device):
        model = InternImage(config).float()  # torch.set_default_dtype may say float64
    if content is not None and checkpoint is not None:
        load_tensors(model, content, checkpoint)
        model.to(device)
    return model.eval().requires_grad_(False)


def _layer_scale(
    config: InternImageConfig,
    layer_scale: float | Literal["auto"] | None,
    features_only: bool,
    content: CheckpointTensors | None,
) -> float | None:
    if layer_scale is None or not isinstance(layer_scale, str):
        return layer_scale
    if layer_scale != AUTO:
        raise InvalidArgumentError(
            "layer_scale is invalid", got=repr(layer_scale), allowed='a number, None or "auto"'
        )
    published = config.detection_layer_scale if features_only else config.layer_scale
    if content is None:
        return published
    # The checkpoint holds the values: only None or not None matters.
    return (published or 1.0) if has_layer_scale(content) else None
