"""The configuration of an InternImage: plain values, no PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from dcnv3_tvm.checks import integer
from dcnv3_tvm.errors import InvalidArgumentError

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

KERNEL_SIZE: Final = 3
"""Kernel of every DCNv3 in an InternImage; stride, pad and dilation are 1."""


@dataclasses.dataclass(frozen=True)
class InternImageConfig:
    """The configuration of an InternImage.

    Stage ``i`` has ``channels * 2**i`` channels, ``depths[i]`` blocks and ``groups[i]`` channel
    groups, at stride ``4 * 2**i``.

    Parameters
    ----------
    variant : str
        Name, for example ``"internimage_t"``.
    channels : int
        Channels of the first stage; even.
    depths, groups : tuple of int
        Number of blocks, and of DCNv3 channel groups, in each of the four stages.
    mlp_ratio : float
        Hidden channels of the MLP relative to its channels.
    layer_scale : float or None
        Initial value of ``gamma1`` and ``gamma2``; None for no layer scale.
    detection_layer_scale : float or None
        `layer_scale` of the published detection and segmentation backbones.
    offset_scale : float
        DCNv3's factor on the regular grid and on the offsets.
    post_norm : bool
        Normalise after DCNv3 and MLP instead of before.
    res_post_norm : bool
        Normalise both before and after DCNv3 and MLP.
    level2_post_norm_block_ids : tuple of int
        Blocks of stage 2 that are followed by an additional norm.
    center_feature_scale : bool
        Blend DCNv3's result with its input by a learned gate per group.
    dw_kernel_size : int
        Kernel of the depthwise convolution before offsets and mask; odd.
    remove_center : bool
        Leave out DCNv3's central kernel point.
    clip_projector : bool
        Classify with attention pooling over stages 2 and 3 instead of average pooling.
    head_ratio : float
        Channels of the average-pooling head relative to those of stage 3.
    clip_channels, clip_heads, clip_output_channels : int
        Channels, attention heads and output channels of the attention pooling.
    num_classes : int
        Number of logits; 0 removes the last linear layer.
    features_only : bool
        Build no head; return feature maps.
    out_indices : tuple of int
        Stages whose feature maps are returned with `features_only`.
    resolution : int
        Image height and width of the published accuracy, in pixels.

    Raises
    ------
    InvalidArgumentError
        If the values are inconsistent.
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
        object.__setattr__(self, "num_classes", integer("num_classes", self.num_classes, low=0))
        indices = tuple(integer("out_indices", index, low=0, high=3) for index in self.out_indices)
        object.__setattr__(self, "out_indices", indices)
        if len(self.depths) != 4 or len(self.groups) != 4 or min(*self.depths, *self.groups) < 1:
            raise InvalidArgumentError(
                "depths and groups need one positive number for each of the four stages",
                got=f"depths={self.depths}, groups={self.groups}",
                allowed="for example depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)",
            )
        for width, group in zip(self.feature_channels, self.groups, strict=True):
            if width % group or self.channels % 2:
                raise InvalidArgumentError(
                    "the channels of a stage cannot be divided into its groups",
                    got=f"{width} channels, {group} groups",
                    allowed="an even number of channels, and a multiple of the groups",
                )
        if self.dw_kernel_size % 2 == 0:
            raise InvalidArgumentError(
                "dw_kernel_size is even, which would change the size of the feature map",
                got=self.dw_kernel_size,
                allowed="an odd number",
            )
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise InvalidArgumentError(
                "res_post_norm cannot be combined with post_norm or layer_scale",
                got=f"post_norm={self.post_norm}, layer_scale={self.layer_scale}",
                allowed="post_norm=False, layer_scale=None",
            )
        if any(not 0 <= index < self.depths[2] for index in self.level2_post_norm_block_ids):
            raise InvalidArgumentError(
                "level2_post_norm_block_ids names a block that stage 2 does not have",
                got=self.level2_post_norm_block_ids,
                allowed=f"0 to {self.depths[2] - 1}",
            )
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise InvalidArgumentError(
                "out_indices is invalid",
                got=self.out_indices,
                allowed="stages 0 to 3 in ascending order, each at most once",
            )

    @property
    def feature_channels(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return (self.channels, self.channels * 2, self.channels * 4, self.channels * 8)

    @property
    def feature_strides(self) -> tuple[int, int, int, int]:
        """Strides of the four stages relative to the image."""
        return (4, 8, 16, 32)

    @property
    def stage_norm(self) -> bool:
        """Whether each stage ends with a norm."""
        return not self.post_norm or self.center_feature_scale

    @property
    def feature_info(self) -> tuple[dict[str, Any], ...]:
        """Channels, stride and module of each returned feature map, with timm's keys."""
        rows = zip(self.feature_channels, self.feature_strides, strict=True)
        return tuple(
            {"num_chs": channels, "reduction": stride, "module": f"levels.{index}"}
            for index, (channels, stride) in enumerate(rows)
            if not self.features_only or index in self.out_indices
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the model's input, as plain values.

        The shorter side is resized to ``resize``, the centre is cropped to ``crop`` (height,
        width), and RGB values in 0..1 are normalised with ``mean`` and ``std``.
        """
        return {
            "resize": self.resolution,
            "crop": [self.resolution, self.resolution],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bicubic",
            "layout": "NCHW",
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InternImageConfig:
        """Restore a configuration from `to_json`."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)
