"""Models by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.checkpoints.files import Tensors, read_tensors
from dcnv3_tvm.frontend.checkpoints.load import has_layer_scale, load_tensors
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import InternImageConfig, model_config

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
    """Build an InternImage, for inference.

    Parameters
    ----------
    name : str
        One of `dcnv3_tvm.frontend.list_models`.
    checkpoint : str, Path or None
        Weights, in any layout `load_checkpoint` takes. None initialises them as published: such
        a model computes nothing useful, and deforms nothing.
    num_classes : int or None
        Logits; 0 for pooled features; None for the variant's number (1000).
    features_only : bool
        Build a feature pyramid without a head.
    out_indices : sequence of int
        Stages whose maps a pyramid returns, of 0 to 3.
    layer_scale : float, None or "auto"
        Initial layer scale; None builds none. ``"auto"`` follows the checkpoint; without one it
        is what was published for classification, or with `features_only` for detection.
    use_ema, ignore_objects, allow_pickle : bool
        As of `load_checkpoint`.
    device : str or torch.device
        Where the weights go; ``"meta"`` allocates none.

    Returns
    -------
    InternImage
        In evaluation mode, its parameters frozen: the operator has no backward pass.

    Raises
    ------
    InvalidArgumentError
        If the name or an option is unknown.
    CheckpointError
        If the checkpoint cannot be read or does not fit exactly.

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
    # Without a checkpoint the weights are initialised where they stay; with one they are its own.
    with torch.device("meta" if content is not None else device):
        model = InternImage(config)
    if content is not None and checkpoint is not None:
        load_tensors(model, content, checkpoint)
        model.to(device)
    return model.eval().requires_grad_(False)


def _layer_scale(
    config: InternImageConfig,
    asked: float | Literal["auto"] | None,
    features_only: bool,
    content: Tensors | None,
) -> float | None:
    if asked is None or not isinstance(asked, str):
        return asked
    if asked != AUTO:
        raise InvalidArgumentError(
            "layer_scale is not known", got=repr(asked), allowed='a number, None or "auto"'
        )
    published = config.detection_layer_scale if features_only else config.layer_scale
    if content is None:
        return published
    # The values come from the checkpoint: it matters only whether there is one.
    return (published or 1.0) if has_layer_scale(content) else None
