"""InternImage in PyTorch, with the state-dict keys of the published weights.

An image passes the stem and four stages. A stage is a stack of blocks (DCNv3, then MLP, each with
a residual connection), followed by a downsampling to the next stage:

    image (N, 3, H, W)
    stem      -> (N, H/4, W/4, C)
    stage 0   -> (N, H/4, W/4, C)         downsample -> (N, H/8, W/8, 2C)
    stage 1   -> (N, H/8, W/8, 2C)        downsample -> (N, H/16, W/16, 4C)
    stage 2   -> (N, H/16, W/16, 4C)      downsample -> (N, H/32, W/32, 8C)
    stage 3   -> (N, H/32, W/32, 8C)
    head      -> (N, num_classes)

Sizes that do not divide are rounded up. The modules can be trained; there is no dropout and no
stochastic depth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.heads import AttentionPooling, convolution_head
from dcnv3_tvm.frontend.models.layers import MLP, ToChannelsFirst, layer_norm
from dcnv3_tvm.pytorch.dcnv3_module import DCNv3
from dcnv3_tvm.pytorch.layers import layer_norm_to_channels_last, recomputed


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: image (N, 3, H, W) to (N, H/4, W/4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = layer_norm_to_channels_last(channels // 2).append(ToChannelsFirst())
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = layer_norm_to_channels_last(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image."""
        x = self.act(self.norm1(self.conv1(image)))
        embedded: Tensor = self.norm2(self.conv2(x))
        return embedded


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and LayerNorm: (N, H, W, C) to (N, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False
        )
        self.norm = layer_norm_to_channels_last(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width, double the channels."""
        halved: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return halved


class Block(nn.Module):
    """DCNv3 and MLP, each with normalisation and a residual connection, on (N, H, W, C).

    Parameters
    ----------
    config : InternImageConfig
        Sets where the norms are and whether there is a layer scale.
    channels, group : int
        Channels and channel groups of the stage.
    """

    recompute = False
    """Whether backward computes cheap intermediate results again."""

    def __init__(self, config: InternImageConfig, channels: int, group: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.res_post_norm = config.res_post_norm
        self.layer_scale = config.layer_scale is not None
        self.norm1 = layer_norm(channels)
        self.dcn = DCNv3(
            channels,
            group=group,
            dw_kernel_size=config.dw_kernel_size,
            offset_scale=config.offset_scale,
            center_feature_scale=config.center_feature_scale,
            remove_center=config.remove_center,
        )
        self.norm2 = layer_norm(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), config.layer_scale))
        if config.res_post_norm:
            self.res_post_norm1 = layer_norm(channels)
            self.res_post_norm2 = layer_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, H, W, C)."""
        y: Tensor = self.norm1(self.dcn(x)) if self.post_norm else self.dcn(self.norm1(x))
        if self.res_post_norm:
            y = self.res_post_norm1(y)
        x = x + (self.gamma1 * y if self.layer_scale else y)

        y = self._recomputed_mlp(x) if self.recompute else self._mlp(x)
        if self.res_post_norm:
            y = self.res_post_norm2(y)
        return x + (self.gamma2 * y if self.layer_scale else y)

    def _mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return y

    def _recomputed_mlp(self, x: Tensor) -> Tensor:
        """Return the result of `_mlp`; backward computes the GELU and the norm before it again."""
        mlp = self.mlp
        y: Tensor
        if self.post_norm:
            y = self.norm2(recomputed(lambda hidden: mlp.fc2(mlp.act(hidden)), mlp.fc1(x)))
        else:
            hidden = recomputed(lambda x: mlp.fc1(self.norm2(x)), x)
            y = recomputed(lambda hidden: mlp.fc2(mlp.act(hidden)), hidden)
        return y


class Stage(nn.Module):
    """A stack of blocks at one resolution, and the downsampling to the next stage.

    Parameters
    ----------
    config : InternImageConfig
        Configuration of the model.
    index : int
        Stage, 0 to 3; the last has no downsampling.
    """

    def __init__(self, config: InternImageConfig, index: int) -> None:
        super().__init__()
        channels = config.feature_channels[index]
        self.blocks = nn.ModuleList(
            Block(config, channels, config.groups[index]) for _ in range(config.depths[index])
        )
        self.norm = layer_norm(channels) if config.stage_norm else None
        self.post_norm_block_ids = config.level2_post_norm_block_ids if index == 2 else ()
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(layer_norm(channels) for _ in self.post_norm_block_ids)
        self.downsample = Downsample(channels) if index < 3 else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, H, W, C); `InternImage` calls `downsample` itself."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(index)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x


class InternImage(nn.Module):
    """The encoder with a classification head, or as a feature pyramid.

    Parameters
    ----------
    config : InternImageConfig
        Configuration, for example one of `dcnv3_tvm.frontend.models.variants`.

    Notes
    -----
    Weights are initialised as published, so a model without a checkpoint samples the regular grid.
    """

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Stem(config.channels)
        self.levels = nn.ModuleList(Stage(config, index) for index in range(4))
        if not config.features_only:
            self._build_head()
        self._initialise()

    def _build_head(self) -> None:
        config = self.config
        last = config.feature_channels[3]
        if config.clip_projector:
            width = config.clip_channels
            self.dcnv3_head_x4 = nn.Sequential(
                nn.Conv2d(last, width * 4, kernel_size=1), nn.PixelShuffle(2)
            )
            self.dcnv3_head_x3 = nn.Conv2d(last // 2, width, kernel_size=1)
            self.clip_projector = AttentionPooling(
                width, config.clip_output_channels, config.clip_heads
            )
            self.fc_norm = layer_norm(config.clip_output_channels)
            head_channels = config.clip_output_channels
        else:
            head_channels = int(last * config.head_ratio)
            self.conv_head = convolution_head(last, head_channels)
        self.head = (
            nn.Linear(head_channels, config.num_classes) if config.num_classes else nn.Identity()
        )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.reset_parameters()

    def recompute_activations(self) -> None:
        """Train with less memory: backward computes norms, activations and offsets again.

        What is computed is the same. Does nothing for ``torch.compile`` and ``torch.func``.
        """
        for module in self.modules():
            if isinstance(module, Block | DCNv3):
                module.recompute = True

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Classify an image, or compute its feature maps.

        Parameters
        ----------
        image : Tensor
            (N, 3, H, W), normalised with ``config.preprocessing``. Any size, but the
            clip-projector head needs even height and width in stage 2 (stride 16).

        Returns
        -------
        Tensor or list of Tensor
            Logits (N, num_classes); pooled features (N, C) with ``num_classes=0``; with
            `features_only`, the feature maps (N, C, H', W') of the stages in `out_indices`.

        Raises
        ------
        InvalidArgumentError
            If the image has another shape.
        """
        if self.config.features_only:
            pyramid = self.forward_pyramid(image)
            return [pyramid[index] for index in self.config.out_indices]
        logits: Tensor = self.head(self._pool(self._stages(image)))
        return logits

    def forward_pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the feature maps (N, C, H', W') of all four stages, strides 4, 8, 16 and 32.

        They are taken before the downsampling of their stage.
        """
        return [x.permute(0, 3, 1, 2).contiguous() for x in self._stages(image)]

    def _stages(self, image: Tensor) -> list[Tensor]:
        """Return the output (N, H', W', C) of each stage."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise InvalidArgumentError(
                "the image does not have the shape that the model takes",
                got=f"shape {tuple(image.shape)}",
                allowed="(N, 3, H, W)",
                hint="For channels-last images, pass image.permute(0, 3, 1, 2).",
            )
        x: Tensor = self.patch_embed(image)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
            if isinstance(level, Stage) and level.downsample is not None:
                x = level.downsample(x)
        return maps

    def _pool(self, maps: list[Tensor]) -> Tensor:
        """Pool the stage outputs to (N, C), the input of the last linear layer."""
        stage2, stage3 = (x.permute(0, 3, 1, 2) for x in maps[2:])
        if not self.config.clip_projector:
            pooled: Tensor = self.conv_head(stage3)
            return pooled.mean((2, 3))
        stage2 = self.dcnv3_head_x3(stage2)
        stage3 = self.dcnv3_head_x4(stage3)  # upsampled by 2
        if stage2.shape[2:] != stage3.shape[2:]:
            raise InvalidArgumentError(
                "the clip-projector head needs even height and width in stage 2",
                got=f"{stage2.shape[2]} x {stage2.shape[3]}",
                allowed="for example an image whose height and width are multiples of 32",
                hint="Resize or crop the image, or use features_only=True.",
            )
        tokens = (stage2 + stage3).flatten(2).transpose(1, 2)
        result: Tensor = self.fc_norm(self.clip_projector(tokens))
        return result
