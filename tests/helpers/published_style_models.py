"""Small models in the manner of the published ones, for the importer's tests.

The attributes and the way to the sampling function are those that importers meet; the text and the
networks are this project's own.
"""

import dataclasses
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm.verify.pytorch_reference import dcnv3_core_pytorch


class DCNv3Function(torch.autograd.Function):
    """Stands for the CUDA extension: must never run, and never be traced."""

    @staticmethod
    def forward(_context: Any, *_arguments: Any) -> Any:
        raise RuntimeError("not implemented on the CPU")


class DCNv3Base(nn.Module):
    """What both published modules have."""

    def __init__(
        self,
        channels=8,
        kernel_size=3,
        stride=1,
        pad=1,
        dilation=1,
        group=2,
        offset_scale=1.0,
        center_feature_scale=False,
        remove_center=False,
    ):
        super().__init__()
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.group_channels = channels // group
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = int(remove_center)
        points = kernel_size * kernel_size - self.remove_center
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            ToLast(),
            nn.LayerNorm(channels, eps=1e-6),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, group * points * 2)
        self.mask = nn.Linear(channels, group * points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def sampling(self, x):
        """Return the projected input, the offsets, the mask and the features they come from."""
        local = self.dw_conv(x.permute(0, 3, 1, 2))
        mask = F.softmax(self.mask(local).unflatten(-1, (self.group, -1)), -1).flatten(-2)
        return self.input_proj(x), self.offset(local), mask, local

    def sizes(self):
        values = (self.kernel_size, self.stride, self.pad, self.dilation)
        pairs = [value for value in values for _ in range(2)]
        return (*pairs, self.group, self.group_channels, self.offset_scale)

    def finish(self, y, projected, local):
        if self.center_feature_scale:
            gate = F.linear(
                local, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            gate = gate[..., None].repeat(1, 1, 1, 1, self.group_channels).flatten(-2)
            y = y * (1 - gate) + projected * gate
        return self.output_proj(y)


class ToLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class DCNv3Pytorch(DCNv3Base):
    """With the published fallback, known by a global name."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = dcnv3_core_pytorch(projected, offset, mask, *self.sizes(), self.remove_center)
        return self.finish(y, projected, local)


class DCNv3Cuda(DCNv3Base):
    """With the autograd function in front of the CUDA extension."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = DCNv3Function.apply(
            projected, offset, mask.type(x.dtype), *self.sizes(), 256, self.remove_center
        )
        return self.finish(y, projected, local)


class DCNv3CudaOld(DCNv3Base):
    """As the first published version: without remove_center."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = DCNv3Function.apply(projected, offset, mask, *self.sizes(), 256)
        return self.finish(y, projected, local)


def decorated(method):
    def wrapper(self, *arguments):
        return method(self, *arguments)

    return wrapper


class DCNv3Decorated(DCNv3Base):
    """The method that knows the name is inside a decorator."""

    @decorated
    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = (lambda *tensors: dcnv3_core_pytorch(*tensors, *self.sizes()))(projected, offset, mask)
        return self.finish(y, projected, local)


def helper(tensors, sizes):
    return dcnv3_core_pytorch(*tensors, *sizes)


class DCNv3Helper(DCNv3Base):
    """The name is known to a function that forward calls."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        return self.finish(helper((projected, offset, mask), self.sizes()), projected, local)


this = sys.modules[__name__]


class DCNv3ThroughModule(DCNv3Base):
    """The name is an attribute of an imported Python module."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = this.dcnv3_core_pytorch(projected, offset, mask, *self.sizes())
        return self.finish(y, projected, local)


class DCNv3Attribute(DCNv3Base):
    """The function is an attribute of the instance."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.core = DCNv3Function.apply

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = self.core(projected, offset, mask, *self.sizes(), 64, self.remove_center)
        return self.finish(y, projected, local)


class DCNv3Inlined(DCNv3Base):
    """The sampling has another name, but computes the published result."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        y = sampled_elsewhere(projected, offset, mask, *self.sizes())
        return self.finish(y, projected, local)


def sampled_elsewhere(*arguments):
    return getattr(this, "dcnv3_core_" + "pytorch")(*arguments)


class DCNv3Different(DCNv3Base):
    """Has the attributes, and computes something else."""

    def forward(self, x):
        projected, _, _, local = self.sampling(x)
        return self.finish(projected * 2, projected, local)


class DCNv3LateImport(DCNv3Base):
    """Gets its function when it runs, so that no name can be exchanged."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling(x)
        from helpers.published_style_models import dcnv3_core_pytorch as late

        return self.finish(late(projected, offset, mask, *self.sizes()), projected, local)


class Block(nn.Module):
    def __init__(self, core, channels, **options):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.dcn = core(channels, **options)
        self.with_cp = True

    def _inner(self, x):
        return x + self.dcn(self.norm(x))

    def forward(self, x):
        if self.with_cp:
            return torch.utils.checkpoint.checkpoint(self._inner, x, use_reentrant=False)
        return self._inner(x)


class Encoder(nn.Module):
    """Two stages of one block, at strides 2 and 4; the first map is NHWC inside."""

    def __init__(self, core=DCNv3Pytorch, channels=8, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            [Block(core, channels, **options), Block(core, 2 * channels, **options)]
        )
        self.downsample = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)

    def forward_features_seq_out(self, x):
        first = self.blocks[0](self.stem(x).permute(0, 2, 3, 1))
        second = self.downsample(first.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return [first, self.blocks[1](second)]


class Classifier(Encoder):
    """As the published classification class: BatchNorm only in the head."""

    def __init__(self, *arguments, channels=8, **options):
        super().__init__(*arguments, channels=channels, **options)
        self.conv_head = nn.Sequential(
            nn.Conv2d(2 * channels, 3 * channels, 1, bias=False),
            nn.BatchNorm2d(3 * channels),
            nn.GELU(),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3 * channels, 10)

    def forward(self, x):
        last = self.forward_features_seq_out(x)[-1].permute(0, 3, 1, 2)
        return self.head(self.drop(torch.flatten(self.avgpool(self.conv_head(last)), 1)))


class Detector(Encoder):
    """As the published detection class: NCHW maps, chosen; and a train() that returns None."""

    def __init__(self, *arguments, out_indices=(0, 1), **options):
        super().__init__(*arguments, **options)
        self.out_indices = out_indices

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        maps = self.forward_features_seq_out(x)
        return [maps[i].permute(0, 3, 1, 2).contiguous() for i in self.out_indices]


@dataclasses.dataclass
class Output:
    hidden_states: Any = None
    logits: Any = None
    loss: Any = None


class WithOutput(nn.Module):
    """As the Hugging Face classes: the model inside, and a structure as the result."""

    def __init__(self, *arguments, result=Output, **options):
        super().__init__()
        self.model = Classifier(*arguments, **options)
        self.result = result

    def forward(self, pixel_values):
        states = tuple(self.model.forward_features_seq_out(pixel_values))
        return self.result(hidden_states=states, logits=self.model(pixel_values), loss=None)


def randomised(model, seed=0):
    """Give a model weights that deform and scale, and statistics that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
                if "norm" in name or name.endswith(("2.weight", "1.weight")):
                    weight.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                buffer.copy_(1.0 + torch.rand(buffer.shape, generator=generator))
    return model
