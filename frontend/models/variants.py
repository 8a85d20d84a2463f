"""The InternImage variants by name: the released ones, one for digits, and tiny ones for tests."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any, Final

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.config import InternImageConfig


def _released() -> tuple[InternImageConfig, ...]:
    return (
        InternImageConfig(
            variant="internimage_t",
            channels=64,
            depths=(4, 4, 18, 4),
            groups=(4, 8, 16, 32),
            detection_layer_scale=1.0,
        ),
        InternImageConfig(
            variant="internimage_s",
            channels=80,
            depths=(4, 4, 21, 4),
            groups=(5, 10, 20, 40),
            layer_scale=1e-5,
            detection_layer_scale=1.0,
            post_norm=True,
        ),
        InternImageConfig(
            variant="internimage_b",
            channels=112,
            depths=(4, 4, 21, 4),
            groups=(7, 14, 28, 56),
            layer_scale=1e-5,
            detection_layer_scale=1.0,
            post_norm=True,
        ),
        InternImageConfig(
            variant="internimage_l",
            channels=160,
            depths=(5, 5, 22, 5),
            groups=(10, 20, 40, 80),
            layer_scale=1e-5,
            detection_layer_scale=1.0,
            offset_scale=2.0,
            post_norm=True,
            resolution=384,
        ),
        InternImageConfig(
            variant="internimage_xl",
            channels=192,
            depths=(5, 5, 24, 5),
            groups=(12, 24, 48, 96),
            layer_scale=1e-5,
            detection_layer_scale=1.0,
            offset_scale=2.0,
            post_norm=True,
            resolution=384,
        ),
        InternImageConfig(
            variant="internimage_h",
            channels=320,
            depths=(6, 6, 32, 6),
            groups=(10, 20, 40, 80),
            res_post_norm=True,
            level2_post_norm_block_ids=(5, 11, 17, 23, 29),
            center_feature_scale=True,
            dw_kernel_size=5,
            clip_projector=True,
            resolution=640,
        ),
        InternImageConfig(
            variant="internimage_g",
            channels=512,
            depths=(2, 2, 48, 4),
            groups=(16, 32, 64, 128),
            post_norm=True,
            level2_post_norm_block_ids=(5, 11, 17, 23, 29, 35, 41, 47),
            center_feature_scale=True,
            dw_kernel_size=5,
            clip_projector=True,
            resolution=512,
        ),
    )


def _digits() -> InternImageConfig:
    """Return the model that ``examples/train_digits.py`` trains."""
    return InternImageConfig(
        variant="digits_internimage",
        channels=16,
        depths=(1, 1, 1, 1),
        groups=(2, 4, 8, 16),
        mlp_ratio=2.0,
        num_classes=10,
        resolution=32,
    )


def _tiny() -> tuple[InternImageConfig, ...]:
    """One variant per path through a block; together they use every option."""
    base = InternImageConfig(
        variant="test_internimage",
        channels=8,
        depths=(1, 1, 2, 1),
        groups=(2, 4, 8, 16),
        mlp_ratio=2.0,
        clip_channels=32,
        clip_heads=4,
        clip_output_channels=24,
        num_classes=10,
        resolution=32,
    )
    options: dict[str, dict[str, Any]] = {
        "pre_norm": {"depths": (1, 1, 1, 1), "detection_layer_scale": 1.0},
        "pre_norm_scale": {"layer_scale": 1.0, "remove_center": True},
        "post_norm": {
            "post_norm": True,
            "level2_post_norm_block_ids": (1,),
            "center_feature_scale": True,
            "dw_kernel_size": 5,
            "clip_projector": True,
        },
        "post_norm_scale": {
            "post_norm": True,
            "layer_scale": 1e-5,
            "detection_layer_scale": 1.0,
            "offset_scale": 2.0,
        },
        "res_post_norm": {
            "res_post_norm": True,
            "level2_post_norm_block_ids": (0, 1),
            "center_feature_scale": True,
            "dw_kernel_size": 5,
            "clip_projector": True,
        },
    }
    return tuple(
        dataclasses.replace(base, variant=f"test_internimage_{name}", **values)
        for name, values in options.items()
    )


VARIANTS: Final[dict[str, InternImageConfig]] = {
    config.variant: config for config in (*_released(), _digits(), *_tiny())
}
"""Configurations by name, as used for classification.

Values are those of the configuration files of OpenGVLab/InternImage.
"""


def list_models(pattern: str = "*") -> list[str]:
    """List the names of `create_model` that match a shell pattern, smallest model first.

    Parameters
    ----------
    pattern : str
        As in `fnmatch`: ``*``, ``?`` and ``[...]``.

    Returns
    -------
    list of str

    Examples
    --------
    >>> from dcnv3_tvm import frontend
    >>> frontend.list_models("internimage_[tsb]")
    ['internimage_t', 'internimage_s', 'internimage_b']
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]


def model_config(name: str) -> InternImageConfig:
    """Return the configuration of a variant, as used for classification.

    Raises
    ------
    InvalidArgumentError
        If there is no such variant.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    usual = name.lower().replace("-", "_")
    close = [usual] if usual in VARIANTS else difflib.get_close_matches(usual, VARIANTS, cutoff=0.5)
    raise InvalidArgumentError(
        "there is no model with this name",
        got=repr(name),
        allowed=", ".join(list_models("internimage_*")),
        hint=f"Did you mean {' or '.join(close)}?" if close else "list_models() lists all names.",
    )
