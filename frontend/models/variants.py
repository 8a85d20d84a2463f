"""The InternImage configurations: the released ones, and tiny ones for tests. Plain values only."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any, Final

from dcnv3_tvm.errors import InvalidArgumentError

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

KERNEL_SIZE: Final = 3
"""Kernel of every DCNv3 in an InternImage; stride, pad and dilation are 1."""


@dataclasses.dataclass(frozen=True)
class InternImageConfig:
    """What an InternImage is built from.

    Stage ``i`` has ``channels * 2**i`` channels, ``depths[i]`` blocks and ``groups[i]`` groups,
    and works at one pixel for ``4 * 2**i`` pixels of the image.

    Parameters
    ----------
    variant : str
        Name, for example ``"internimage_t"``.
    channels : int
        Channels of the first stage; even.
    depths, groups : tuple of int
        Blocks, and groups of the operator, of each of the four stages.
    mlp_ratio : float
        Hidden channels of a block's MLP over its channels.
    layer_scale : float or None
        Initial value of ``gamma1`` and ``gamma2``; None leaves them out.
    detection_layer_scale : float or None
        What the published detection and segmentation backbones use for `layer_scale`.
    offset_scale : float
        The operator's factor on grid and offsets.
    post_norm : bool
        Normalise behind the operator and the MLP instead of before them.
    res_post_norm : bool
        Normalise before and behind them.
    level2_post_norm_block_ids : tuple of int
        Blocks of the third stage that are followed by one more norm.
    center_feature_scale : bool
        Blend the operator's result with its input by a learned gate for each group.
    dw_kernel_size : int
        Kernel of the depthwise convolution that offsets and mask are computed from; odd.
    remove_center : bool
        Leave out the operator's central point.
    clip_projector : bool
        Classify by attention pooling over the last two stages instead of by average pooling.
    head_ratio : float
        Channels of the average-pooling head over those of the last stage.
    clip_channels, clip_heads, clip_output_channels : int
        Width, attention heads and result of the attention pooling.
    num_classes : int
        Logits; 0 ends the model before its last linear layer.
    features_only : bool
        No head: return the feature maps.
    out_indices : tuple of int
        Stages whose maps are returned with `features_only`.
    resolution : int
        Height and width of the image the published accuracy is for, in pixels.

    Raises
    ------
    InvalidArgumentError
        If the values do not make a model.
    """

    variant: str
    channels: int
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    detection_layer_scale: float | None = None
    offset_scale: float = 1.0
    post_norm: bool = False
    res_post_norm: bool = False
    level2_post_norm_block_ids: tuple[int, ...] = ()
    center_feature_scale: bool = False
    dw_kernel_size: int = 3
    remove_center: bool = False
    clip_projector: bool = False
    head_ratio: float = 1.5
    clip_channels: int = 1024
    clip_heads: int = 16
    clip_output_channels: int = 768
    num_classes: int = 1000
    features_only: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    resolution: int = 224

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.groups) != 4 or min(*self.depths, *self.groups) < 1:
            raise InvalidArgumentError(
                "depths and groups do not hold one positive number for each of the four stages",
                got=f"depths={self.depths}, groups={self.groups}",
                allowed="for example depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)",
            )
        for width, group in zip(self.feature_channels, self.groups, strict=True):
            if width % group or self.channels % 2:
                raise InvalidArgumentError(
                    "the channels of a stage cannot be divided into its groups",
                    got=f"{width} channels, {group} groups",
                    allowed="an even number of channels, a multiple of group",
                )
        if self.dw_kernel_size % 2 == 0:
            raise InvalidArgumentError(
                "dw_kernel_size is even, which would change the size of the map",
                got=self.dw_kernel_size,
                allowed="an odd number",
            )
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise InvalidArgumentError(
                "res_post_norm goes neither with post_norm nor with layer_scale",
                got=f"post_norm={self.post_norm}, layer_scale={self.layer_scale}",
                allowed="post_norm=False, layer_scale=None",
            )
        if any(not 0 <= index < self.depths[2] for index in self.level2_post_norm_block_ids):
            raise InvalidArgumentError(
                "level2_post_norm_block_ids names a block the third stage does not have",
                got=self.level2_post_norm_block_ids,
                allowed=f"0 to {self.depths[2] - 1}",
            )
        if self.num_classes < 0:
            raise InvalidArgumentError(
                "num_classes is negative",
                got=self.num_classes,
                allowed="0 (pooled features instead of logits) or more",
            )
        allowed_indices = all(index in range(4) for index in self.out_indices)
        if (
            not self.out_indices
            or not allowed_indices
            or list(self.out_indices) != sorted(set(self.out_indices))
        ):
            raise InvalidArgumentError(
                "out_indices does not choose stages",
                got=self.out_indices,
                allowed="some of 0, 1, 2, 3, each once, in rising order",
            )

    @property
    def feature_channels(self) -> tuple[int, int, int, int]:
        """Channels of the four stages' maps."""
        return (self.channels, self.channels * 2, self.channels * 4, self.channels * 8)

    @property
    def feature_strides(self) -> tuple[int, int, int, int]:
        """Pixels of the image to one step of each stage's map."""
        return (4, 8, 16, 32)

    @property
    def stage_norm(self) -> bool:
        """Whether each stage ends with a norm."""
        return not self.post_norm or self.center_feature_scale

    @property
    def feature_info(self) -> tuple[dict[str, Any], ...]:
        """Channels, stride and module of each stage's map, under the names timm gives them."""
        rows = zip(self.feature_channels, self.feature_strides, strict=True)
        return tuple(
            {"num_chs": channels, "reduction": stride, "module": f"levels.{index}"}
            for index, (channels, stride) in enumerate(rows)
            if not self.features_only or index in self.out_indices
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a photograph becomes the model's input, plain values.

        The shorter side is resized to ``resize``, ``crop`` (height, width) is cut from the
        centre, and values in 0..1 are normalised with ``mean`` and ``std`` (RGB).
        """
        return {
            "resize": self.resolution,
            "crop": [self.resolution, self.resolution],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bicubic",
            "layout": "NCHW",
        }

    def check_any_size(self) -> None:
        """Refuse a model that cannot be compiled for images of any size.

        Raises
        ------
        InvalidArgumentError
            If its head adds maps whose sizes are equal for images of some sizes alone.
        """
        if self.clip_projector and not self.features_only:
            raise InvalidArgumentError(
                "the clip-projector head needs a fixed image size",
                got=f"{self.variant} with dynamic_size",
                hint="Import the model with a fixed image size, or build it with "
                "features_only=True (--features-only).",
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InternImageConfig:
        """Read back what `to_json` gave."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)


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


def _tiny() -> tuple[InternImageConfig, ...]:
    """One variant for each path through a block; between them they use every option."""
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
        "pre_norm": {"detection_layer_scale": 1.0},
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
    config.variant: config for config in (*_released(), *_tiny())
}
"""Configuration of each name `create_model` takes, as used for classification.

Sources: the configuration files of OpenGVLab/InternImage (T to XL, H, G).
"""


def list_models(pattern: str = "*") -> list[str]:
    """Return the names `create_model` takes that match a shell pattern, smallest first.

    Parameters
    ----------
    pattern : str
        As of `fnmatch`: ``*``, ``?`` and ``[...]``.

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
    """Return a variant's configuration, as used for classification.

    Raises
    ------
    InvalidArgumentError
        If there is no such variant.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    close = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
    raise InvalidArgumentError(
        "there is no model of this name",
        got=repr(name),
        allowed=", ".join(list_models("internimage_*")),
        hint=f"Did you mean {' or '.join(close)}?" if close else "list_models() names them all.",
    )
