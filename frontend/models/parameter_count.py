"""Count the parameters of a configuration without building the model or importing torch."""

from __future__ import annotations

from dcnv3_tvm.frontend.models.config import KERNEL_SIZE, InternImageConfig


def parameter_count(config: InternImageConfig) -> int:
    """Count the parameters of an InternImage, without buffers.

    Examples
    --------
    >>> from dcnv3_tvm.frontend.models.variants import model_config
    >>> parameter_count(model_config("internimage_t"))
    29918424
    """
    total = _convolution(3, config.channels // 2, 3) + config.channels
    total += _convolution(config.channels // 2, config.channels, 3) + 2 * config.channels
    stages = zip(config.feature_channels, config.depths, config.groups, strict=True)
    for index, (channels, depth, group) in enumerate(stages):
        total += depth * _block(config, channels, group)
        if config.stage_norm:
            total += 2 * channels
        if index < 3:
            total += 9 * channels * 2 * channels + 4 * channels
    total += len(config.level2_post_norm_block_ids) * 2 * config.feature_channels[2]
    return total + (0 if config.features_only else _head(config))


def _block(config: InternImageConfig, channels: int, group: int) -> int:
    points = KERNEL_SIZE**2 - config.remove_center
    hidden = int(channels * config.mlp_ratio)
    norms = 4 if config.res_post_norm else 2
    total = norms * 2 * channels
    if config.layer_scale is not None:
        total += 2 * channels
    total += channels * (config.dw_kernel_size**2 + 1) + 2 * channels
    total += _linear(channels, group * points * 3) + 2 * _linear(channels, channels)
    if config.center_feature_scale:
        total += group * channels + group
    return total + _linear(channels, hidden) + _linear(hidden, channels)


def _head(config: InternImageConfig) -> int:
    last = config.feature_channels[3]
    if config.clip_projector:
        width, pooled = config.clip_channels, config.clip_output_channels
        total = _linear(last, 4 * width) + _linear(last // 2, width)
        total += 3 * 2 * width + 3 * _linear(width, width) + _linear(width, pooled) + 2 * pooled
    else:
        pooled = int(last * config.head_ratio)
        total = last * pooled + 2 * pooled
    return total + (_linear(pooled, config.num_classes) if config.num_classes else 0)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _convolution(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs
