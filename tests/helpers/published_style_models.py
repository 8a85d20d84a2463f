"""Small models in the style of the published ones, for tests of the importer.

They have the attributes of the published modules and call the sampling function in the ways found
in published code; the code and the networks are this project's own.
"""

import dataclasses
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm.verify.pytorch_reference import dcnv3_core_pytorch

this_module = sys.modules[__name__]


class DCNv3Function(torch.autograd.Function):
    """Has the name of the CUDA extension's function; must never run or be traced."""

    @staticmethod
    def forward(_context: Any, *_arguments: Any) -> Any:
        raise RuntimeError("not implemented on the CPU")


class ToChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class DCNv3Base(nn.Module):
    """The layers and attributes of both published modules, without a forward."""

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
            nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, group * points * 2)
        self.mask = nn.Linear(channels, group * points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def sampling_inputs(self, x):
        """Return the projected input, the offsets, the mask and the local features."""
        local = self.dw_conv(x.permute(0, 3, 1, 2))
        mask = F.softmax(self.mask(local).unflatten(-1, (self.group, -1)), -1).flatten(-2)
        return self.input_proj(x), self.offset(local), mask, local

    def sampling_arguments(self):
        """Return the published positional arguments from kernel_h to offset_scale."""
        values = (self.kernel_size, self.stride, self.pad, self.dilation)
        pairs = [value for value in values for _ in range(2)]
        return (*pairs, self.group, self.group_channels, self.offset_scale)

    def project_output(self, y, projected, local):
        if self.center_feature_scale:
            gate = F.linear(
                local, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            gate = gate[..., None].repeat(1, 1, 1, 1, self.group_channels).flatten(-2)
            y = y * (1 - gate) + projected * gate
        return self.output_proj(y)


class DCNv3Pytorch(DCNv3Base):
    """Calls the published PyTorch fallback by its global name."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        arguments = (*self.sampling_arguments(), self.remove_center)
        y = dcnv3_core_pytorch(projected, offset, mask, *arguments)
        return self.project_output(y, projected, local)


class DCNv3Cuda(DCNv3Base):
    """Calls the autograd function around the CUDA extension."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        arguments = (*self.sampling_arguments(), 256, self.remove_center)
        y = DCNv3Function.apply(projected, offset, mask.type(x.dtype), *arguments)
        return self.project_output(y, projected, local)


class DCNv3CudaOld(DCNv3Base):
    """Calls the first published version of the autograd function, without remove_center."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        y = DCNv3Function.apply(projected, offset, mask, *self.sampling_arguments(), 256)
        return self.project_output(y, projected, local)


def decorator(method):
    def wrapper(self, *arguments):
        return method(self, *arguments)

    return wrapper


class DCNv3Decorated(DCNv3Base):
    """Calls the function from a lambda in a decorated method."""

    @decorator
    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        arguments = self.sampling_arguments()
        y = (lambda *tensors: dcnv3_core_pytorch(*tensors, *arguments))(projected, offset, mask)
        return self.project_output(y, projected, local)


def call_core(tensors, arguments):
    return dcnv3_core_pytorch(*tensors, *arguments)


class DCNv3Helper(DCNv3Base):
    """Calls the function through another function."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        y = call_core((projected, offset, mask), self.sampling_arguments())
        return self.project_output(y, projected, local)


class DCNv3ThroughModule(DCNv3Base):
    """Calls the function as an attribute of an imported Python module."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        y = this_module.dcnv3_core_pytorch(projected, offset, mask, *self.sampling_arguments())
        return self.project_output(y, projected, local)


class DCNv3Attribute(DCNv3Base):
    """Calls the function as an attribute of the instance."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.core = DCNv3Function.apply

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        arguments = (*self.sampling_arguments(), 64, self.remove_center)
        y = self.core(projected, offset, mask, *arguments)
        return self.project_output(y, projected, local)


sample_under_another_name = types.FunctionType(
    dcnv3_core_pytorch.__code__,
    dcnv3_core_pytorch.__globals__,
    "sample_under_another_name",
    dcnv3_core_pytorch.__defaults__,
)


class DCNv3OtherName(DCNv3Base):
    """Samples with a function of another name that computes the published result."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        y = sample_under_another_name(projected, offset, mask, *self.sampling_arguments())
        return self.project_output(y, projected, local)


class DCNv3Different(DCNv3Base):
    """Has the published layers, but computes another result."""

    def forward(self, x):
        projected, _, _, local = self.sampling_inputs(x)
        return self.project_output(projected * 2, projected, local)


class DCNv3LateImport(DCNv3Base):
    """Imports the function inside forward, where its name cannot be rebound."""

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        from helpers.published_style_models import dcnv3_core_pytorch as late

        y = late(projected, offset, mask, *self.sampling_arguments())
        return self.project_output(y, projected, local)


class Block(nn.Module):
    def __init__(self, dcnv3, channels, **options):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.dcn = dcnv3(channels, **options)
        self.with_cp = True

    def _residual(self, x):
        return x + self.dcn(self.norm(x))

    def forward(self, x):
        if self.with_cp:
            return torch.utils.checkpoint.checkpoint(self._residual, x, use_reentrant=False)
        return self._residual(x)


class Encoder(nn.Module):
    """Two stages of one block each, at strides 2 and 4, with NHWC feature maps."""

    def __init__(self, dcnv3=DCNv3Pytorch, channels=8, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            [Block(dcnv3, channels, **options), Block(dcnv3, 2 * channels, **options)]
        )
        self.downsample = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)

    def forward_features_seq_out(self, x):
        first = self.blocks[0](self.stem(x).permute(0, 2, 3, 1))
        second = self.downsample(first.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return [first, self.blocks[1](second)]


class Classifier(Encoder):
    """Like the published classification class: a head with BatchNorm."""

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
    """Like the published detection class: selected NCHW maps, and a train() that returns None."""

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
    """Like the Hugging Face classes: wraps a model and returns a structure."""

    def __init__(self, *arguments, result=Output, **options):
        super().__init__()
        self.model = Classifier(*arguments, **options)
        self.result = result

    def forward(self, pixel_values):
        states = tuple(self.model.forward_features_seq_out(pixel_values))
        return self.result(hidden_states=states, logits=self.model(pixel_values), loss=None)


def randomised(model, seed=0):
    """Fill in weights and BatchNorm statistics that all change the result."""
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
