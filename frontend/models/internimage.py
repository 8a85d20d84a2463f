"""InternImage in PyTorch, with the state-dict keys of the published weights.

Written for inference and export: there is no dropout and no stochastic depth, and the deformable
operator offers no backward pass, so these modules cannot be trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.heads import NORM_EPS, AttentionPooling, convolution_head, norm
from dcnv3_tvm.frontend.models.variants import KERNEL_SIZE, InternImageConfig
from dcnv3_tvm.pytorch import operator as torch_op
from dcnv3_tvm.spec import DCNv3Params


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) to (N, C, H, W), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the view."""
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """(N, C, H, W) to (N, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the view."""
        return x.permute(0, 2, 3, 1)


def _norm_after_convolution(channels: int) -> nn.Sequential:
    """LayerNorm over the channels of (N, C, H, W); the result is (N, H, W, C)."""
    return nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=NORM_EPS))


class DCNv3(nn.Module):
    """The operator with its projections, (N, H, W, C) to (N, H, W, C).

    Offsets and mask are computed from the module's input by a depthwise convolution and one
    linear layer each. Both layers start at zero, as published: until weights are loaded, nothing
    is deformed.

    Parameters
    ----------
    channels : int
        C, a multiple of `group`.
    group : int
        Groups of channels, each with offsets of its own.
    kernel_size, dilation : int
        Of the operator; odd kernels only. The padding keeps the size of the map.
    dw_kernel_size : int or None
        Of the depthwise convolution, odd; None for `kernel_size`.
    offset_scale : float
        Factor on grid and offsets.
    center_feature_scale : bool
        Blend the result with the projected input by a learned gate for each group.
    remove_center : bool
        Leave out the central point.
    """

    def __init__(
        self,
        channels: int,
        *,
        group: int,
        kernel_size: int = KERNEL_SIZE,
        dilation: int = 1,
        dw_kernel_size: int | None = None,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        super().__init__()
        dw_kernel_size = dw_kernel_size or kernel_size
        self.params = DCNv3Params(
            group=group,
            kernel_size=kernel_size,
            pad=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
        )
        if channels % group or kernel_size % 2 == 0 or dw_kernel_size % 2 == 0:
            raise InvalidArgumentError(
                "the DCNv3 module cannot be built",
                got=f"channels={channels}, group={group}, kernel_size={kernel_size}, "
                f"dw_kernel_size={dw_kernel_size}",
                allowed="channels a multiple of group; odd kernels",
            )
        self.group_channels = channels // group
        self.center_feature_scale = center_feature_scale
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                padding=(dw_kernel_size - 1) // 2,
                groups=channels,
            ),
            _norm_after_convolution(channels),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, self.params.offset_channels)
        self.mask = nn.Linear(channels, self.params.mask_channels)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def forward(self, x: Tensor) -> Tensor:
        """Deform (N, H, W, C)."""
        projected = self.input_proj(x)
        local = self.dw_conv(x.permute(0, 3, 1, 2))
        offset = self.offset(local)
        logits = self.mask(local).unflatten(-1, (self.params.group, -1))
        mask = torch.softmax(logits, dim=-1).flatten(-2)
        y = self.sample(projected, offset, mask)
        if self.center_feature_scale:
            gate = torch.sigmoid(
                F.linear(
                    local,
                    self.center_feature_scale_proj_weight,
                    self.center_feature_scale_proj_bias,
                )
            )
            gate = gate.repeat_interleave(self.group_channels, dim=-1)
            y = y * (1 - gate) + projected * gate
        result: Tensor = self.output_proj(y)
        return result

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Call the operator on the projected map; subclasses may put another in its place."""
        return torch_op.dcnv3(x, offset, mask, **self.params.keywords())


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: image (N, 3, H, W) to (N, H/4, W/4, C), rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = _norm_after_convolution(channels // 2).append(ToChannelsFirst())
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = _norm_after_convolution(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the image."""
        x = self.act(self.norm1(self.conv1(image)))
        result: Tensor = self.norm2(self.conv2(x))
        return result


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (N, H, W, C) to (N, H/2, W/2, 2C), rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False
        )
        self.norm = _norm_after_convolution(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        result: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return result


class MLP(nn.Module):
    """Linear, GELU, Linear over the last axis."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C)."""
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class Block(nn.Module):
    """DCNv3 and MLP, each with norms and a residual, on (N, H, W, C).

    Parameters
    ----------
    config : InternImageConfig
        Chooses where the norms are and whether a layer scale follows.
    channels, group : int
        Of the stage the block is in.
    """

    def __init__(self, config: InternImageConfig, channels: int, group: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.res_post_norm = config.res_post_norm
        self.layer_scale = config.layer_scale is not None
        self.norm1 = norm(channels)
        self.dcn = DCNv3(
            channels,
            group=group,
            dw_kernel_size=config.dw_kernel_size,
            offset_scale=config.offset_scale,
            center_feature_scale=config.center_feature_scale,
            remove_center=config.remove_center,
        )
        self.norm2 = norm(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), config.layer_scale))
        if config.res_post_norm:
            self.res_post_norm1 = norm(channels)
            self.res_post_norm2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the map."""
        y: Tensor = self.norm1(self.dcn(x)) if self.post_norm else self.dcn(self.norm1(x))
        if self.res_post_norm:
            y = self.res_post_norm1(y)
        x = x + (self.gamma1 * y if self.layer_scale else y)
        y = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        if self.res_post_norm:
            y = self.res_post_norm2(y)
        return x + (self.gamma2 * y if self.layer_scale else y)


class Stage(nn.Module):
    """Blocks, their norms, and (but for the last stage) the downsampling to the next stage.

    Parameters
    ----------
    config : InternImageConfig
        Of the model.
    index : int
        Which of the four stages.
    """

    def __init__(self, config: InternImageConfig, index: int) -> None:
        super().__init__()
        channels = config.feature_channels[index]
        self.blocks = nn.ModuleList(
            Block(config, channels, config.groups[index]) for _ in range(config.depths[index])
        )
        self.norm = norm(channels) if config.stage_norm else None
        self.post_norm_block_ids = config.level2_post_norm_block_ids if index == 2 else ()
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(norm(channels) for _ in self.post_norm_block_ids)
        self.downsample = Downsample(channels) if index < 3 else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, H, W, C), without the downsampling."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(index)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x


class InternImage(nn.Module):
    """The encoder, with one of two classification heads or as a feature pyramid.

    Parameters
    ----------
    config : InternImageConfig
        What to build; see `dcnv3_tvm.frontend.models.variants`.

    Notes
    -----
    For inference only: the deformable operator has no backward pass. Weights are initialised as
    published, so a model without a checkpoint deforms nothing.
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
            self.fc_norm = norm(config.clip_output_channels)
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
                for projection in (module.offset, module.mask):
                    nn.init.zeros_(projection.weight)
                for projection in (module.input_proj, module.output_proj):
                    nn.init.xavier_uniform_(projection.weight)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Classify the image, or encode it.

        Parameters
        ----------
        image : Tensor
            (N, 3, H, W), normalised as ``config.preprocessing`` says. Any size, but the
            clip-projector head needs a third stage (one step for 16 pixels) of even size.

        Returns
        -------
        Tensor or list of Tensor
            Logits (N, num_classes); pooled features when `num_classes` is 0; with
            `features_only`, the maps (N, C, H', W') of the stages in `out_indices`.

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
        """Return the maps (N, C, H', W') of all four stages, at strides 4, 8, 16 and 32.

        Each is taken before the stage's downsampling.
        """
        return [x.permute(0, 3, 1, 2).contiguous() for x in self._stages(image)]

    def _stages(self, image: Tensor) -> list[Tensor]:
        if image.ndim != 4 or image.shape[1] != 3:
            raise InvalidArgumentError(
                "the image does not have the shape the model takes",
                got=f"shape {tuple(image.shape)}",
                allowed="(N, 3, H, W)",
                hint="An image with its channels last needs image.permute(0, 3, 1, 2).",
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
        last = maps[3].permute(0, 3, 1, 2)
        if not self.config.clip_projector:
            pooled: Tensor = self.conv_head(last)
            return pooled.mean((2, 3))
        third = self.dcnv3_head_x3(maps[2].permute(0, 3, 1, 2))
        fourth = self.dcnv3_head_x4(last)
        if third.shape[2:] != fourth.shape[2:]:
            raise InvalidArgumentError(
                "the clip-projector head needs an even number of rows and columns in stage 3",
                got=f"{third.shape[2]} rows and {third.shape[3]} columns",
                allowed="for example an image whose height and width are multiples of 32",
                hint="Resize or crop the image, or use features_only=True.",
            )
        tokens = (third + fourth).flatten(2).transpose(1, 2)
        result: Tensor = self.fc_norm(self.clip_projector(tokens))
        return result
