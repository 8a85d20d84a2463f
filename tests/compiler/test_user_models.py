"""A user's model: DCNv3 in a backbone of their own, with the necks and heads of common papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm import compile_artifact, compile_model, frontend
from dcnv3_tvm.pytorch.dcnv3_module import DCNv3
from dcnv3_tvm.verify.compare import difference
from dcnv3_tvm.verify.entries import entry_outputs
from dcnv3_tvm.verify.random_weights import randomize_

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPE = (1, 3, 36, 52)
OTHER_SHAPE = (2, 3, 41, 30)


class Backbone(nn.Module):
    """Return feature maps of strides 2 and 4."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.dcn = DCNv3(32, group=4)

    def forward(self, image):
        fine = F.relu(self.first(image))
        coarse = self.second(fine)
        return fine, coarse + self.dcn(coarse.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """FPN: resizing to the finer map, BatchNorm, one head for all levels."""

    def __init__(self):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 16, 1) for channels in (16, 32))
        self.smooth = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.head = nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, fine, coarse):
        fine, coarse = self.lateral[0](fine), self.lateral[1](coarse)
        fine = self.smooth(fine + F.interpolate(coarse, size=fine.shape[2:]))
        levels = [fine, F.max_pool2d(coarse, 1, 2)]
        boxes = [torch.sigmoid(self.head(level)).flatten(2).transpose(1, 2) for level in levels]
        return torch.cat(boxes, 1)


class Segmenter(nn.Module):
    """UPerNet: pooling to several sizes, GroupNorm, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size), nn.Conv2d(32, 8, 1), nn.GroupNorm(2, 8), nn.SiLU()
            )
            for size in (1, 2)
        )
        self.fuse = nn.Conv2d(48, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, coarse):
        size = coarse.shape[2:]
        pooled = [F.interpolate(pool(coarse), size=size, mode="bilinear") for pool in self.pools]
        value = F.hardswish(self.fuse(torch.cat([coarse, *pooled], 1)))
        value = self.head(F.leaky_relu(self.up(value), 0.1))
        return F.softmax(F.interpolate(value, scale_factor=2, mode="bilinear"), 1)


class Attention(nn.Module):
    """Channel gating, self-attention with a class token, and reductions over the tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Hardsigmoid())
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.head = nn.Linear(32, 7)

    def forward(self, coarse):
        value = coarse * self.gate(coarse)
        value = value + F.mish(self.grouped(value))
        tokens = value.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens[:, 0]), tokens.amax(1), tokens.std(1), tokens[:, -1]


class ThreeHeads(nn.Module):
    """All heads on one backbone: one compilation covers them."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.boxes = FeaturePyramid()
        self.segments = Segmenter()
        self.attention = Attention()

    def forward(self, image):
        fine, coarse = self.backbone(image)
        return self.boxes(fine, coarse), self.segments(coarse), *self.attention(coarse)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize_(ThreeHeads().eval(), 1)


@pytest.fixture(scope="module")
def imported(model):
    return frontend.import_model(model, example=SHAPE)


def assert_agrees(outputs, model, image, dtype):
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(image).double())
    model.float()
    for output, tensor in zip(outputs["main"], expected, strict=True):
        assert output.shape == tuple(tensor.shape)
        assert difference("main", output, tensor.numpy()).within(dtype)


def test_static_shape(model, imported, rng):
    image = rng.standard_normal(SHAPE).astype("float32")
    assert_agrees(entry_outputs(compile_model(imported), image), model, image, "float32")


@pytest.mark.usefixtures("unoptimized")
def test_dynamic_shape(model, rng):
    compiled = compile_model(
        frontend.import_model(model, example=SHAPE, dynamic_batch=True, dynamic_size=True)
    )
    for shape in (SHAPE, OTHER_SHAPE):
        image = rng.standard_normal(shape).astype("float32")
        assert_agrees(entry_outputs(compiled, image), model, image, "float32")


@pytest.mark.slow
def test_gpu(model, imported, gpu, tmp_path, rng):
    image = rng.standard_normal(SHAPE).astype("float32")
    with gpu.compiling():
        compile_artifact(imported, tmp_path / "model", target="cuda-sm90", dtype="float16")
    assert_agrees(gpu.run_model(tmp_path / "model", [image]), model, image, "float16")
