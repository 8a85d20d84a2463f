"""Code in the published style trains through the stand-in; wrong calls raise."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.pytorch import extensions
from dcnv3_tvm.spec import DCNv3Spec
from helpers.published_style_models import DCNv3Base, DCNv3Pytorch, randomised

GEOMETRY = (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.5)
STEP = 2


@pytest.fixture(scope="module", autouse=True)
def extension():
    """The module that ``import DCNv3`` gives."""
    extensions.install()
    yield importlib.import_module("DCNv3")
    extensions.remove()


def published_function(version):
    """Make an autograd function that calls the extension as the published one does."""
    extension = importlib.import_module("DCNv3")

    class PublishedFunction(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda")
        def forward(context, x, offset, mask, *numbers):
            context.geometry, context.last = numbers[:-1], numbers[-1:] if version > 1.0 else ()
            context.save_for_backward(x, offset, mask)
            return extension.dcnv3_forward(x, offset, mask, *context.geometry, STEP, *context.last)

        @staticmethod
        @torch.autograd.function.once_differentiable
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(context, gradient):
            tensors, step = context.saved_tensors, (gradient.contiguous(), STEP, *context.last)
            gradients = extension.dcnv3_backward(*tensors, *context.geometry, *step)
            return (*gradients, *[None] * 12)

    return PublishedFunction


class DCNv3Extension(DCNv3Base):
    version = 1.1

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x)
        numbers = (*self.sampling_arguments(), self.remove_center)
        function = published_function(self.version)
        y = function.apply(projected, offset, mask.type(projected.dtype), *numbers)
        return self.project_output(y, projected, local)


class OldDCNv3Extension(DCNv3Extension):
    version = 1.0


class YoloBlock(nn.Module):
    """Convolution, DCNv3, BatchNorm and SiLU on NCHW maps, as in forks of detectors."""

    def __init__(self, dcnv3, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.dcnv3 = dcnv3(8, **options)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.dcnv3(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.silu(self.bn(y))


def train_step(dcnv3, options, image, dtype, autocast=False):
    """Return the gradients of one step, and the weights after it."""
    model = randomised(YoloBlock(dcnv3, **options)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(image.to(dtype))
    output.double().square().mean().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    return {name: each.grad for name, each in named.items()}, named


def relative_errors(gradients, expected):
    return [
        float((got.double() - expected[name]).norm() / expected[name].norm())
        for name, got in gradients.items()
        # BatchNorm takes the mean away, so that this gradient is zero.
        if name not in ("dcnv3.output_proj.bias")
    ]


@pytest.mark.parametrize(
    ("dcnv3", "options"),
    [
        (
            DCNv3Extension,
            {"offset_scale": 1.5, "remove_center": True, "center_feature_scale": True},
        ),
        (OldDCNv3Extension, {"kernel_size": 5, "pad": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_a_training_step_equals_one_of_the_pytorch_code(dcnv3, options):
    image = torch.randn(3, 3, 7, 6)
    expected, weights = train_step(DCNv3Pytorch, options, image, torch.float64)
    gradients, found = train_step(dcnv3, options, image, torch.float64)
    assert max(relative_errors(gradients, expected)) < 1e-9
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def test_a_training_step_under_autocast(extension, monkeypatch):
    calls = []

    def backward(*arguments):
        calls.append((arguments, extension.dcnv3_backward(*arguments)))
        return calls[-1][1]

    recorded = types.SimpleNamespace(dcnv3_forward=extension.dcnv3_forward, dcnv3_backward=backward)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "DCNv3", recorded)
        image = torch.randn(3, 3, 7, 6)
        gradients, _ = train_step(DCNv3Extension, {}, image, torch.float32, autocast=True)
    assert {each.dtype for each in gradients.values()} == {torch.float32}
    assert all(each.isfinite().all() and each.any() for each in gradients.values())
    # Rounded weights move points, so that only the gradients of the call itself can be compared.
    (((x, offset, mask, *numbers), found),) = calls
    assert {each.dtype for each in (x, offset, mask, *found)} == {torch.bfloat16}
    spec = DCNv3Spec.of(x.shape, group=2)
    arrays = (each.detach().double().numpy() for each in (numbers[11], x, offset, mask))
    for got, expected in zip(found, dcnv3_gradients(*arrays, spec), strict=True):
        # One rounding to 8 bits, and sums of float32.
        np.testing.assert_allclose(
            got.double(), expected, rtol=2**-8, atol=1e-4 * abs(expected).max()
        )


def tensors(**shapes):
    shapes = {"x": (2, 5, 6, 8), "offset": (2, 5, 6, 36), "mask": (2, 5, 6, 18)} | shapes
    return [torch.zeros(shape) for shape in shapes.values()]


def test_both_argument_lists(extension):
    x, offset, mask = (torch.rand_like(each) for each in tensors())
    expected = extension.dcnv3_forward(x, offset, mask, *GEOMETRY, 1)
    assert torch.equal(extension.dcnv3_forward(x, offset, mask, *GEOMETRY, 64, 0), expected)
    gradients = extension.dcnv3_backward(x, offset, mask, *GEOMETRY, expected, 1)
    again = extension.dcnv3_backward(x, offset, mask, *GEOMETRY, expected, 64, False)
    assert all(map(torch.equal, gradients, again))
    assert [each.shape for each in gradients] == [each.shape for each in (x, offset, mask)]
    without_center = [x, offset[..., :32], mask[..., :16]]
    assert extension.dcnv3_forward(*without_center, *GEOMETRY, 1, True).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 8, 5, 6)}, "NHWC is expected"),
        ({"x": (5, 6, 8)}, "four dimensions"),
        ({"offset": (2, 5, 6, 18)}, "offset has the wrong shape"),
        ({"mask": (2, 5, 5, 18)}, "mask has the wrong shape"),
    ],
)
def test_wrong_shapes_raise(extension, change, message):
    given = tensors(**change)
    gradient = torch.zeros(2, 5, 6, 8)
    with pytest.raises(InvalidArgumentError, match=message):
        extension.dcnv3_forward(*given, *GEOMETRY, STEP, 0)
    with pytest.raises(InvalidArgumentError):
        extension.dcnv3_backward(*given, *GEOMETRY, gradient, STEP, 0)


def test_wrong_gradients_types_devices_and_numbers_raise(extension):
    x, offset, mask = tensors()
    for gradient in (torch.zeros(2, 5, 6, 4), torch.zeros(2, 6, 5, 8), torch.zeros(8)):
        with pytest.raises(InvalidArgumentError, match="grad"):
            extension.dcnv3_backward(x, offset, mask, *GEOMETRY, gradient, STEP, 0)
    for wrong in (x.int(), x.numpy(), None):
        with pytest.raises(InvalidArgumentError, match="not a tensor of floating-point numbers"):
            extension.dcnv3_forward(wrong, offset, mask, *GEOMETRY, STEP, 0)
    with pytest.raises(InvalidArgumentError, match="offset: meta"):
        extension.dcnv3_forward(x, offset.to("meta"), mask, *GEOMETRY, STEP, 0)
    with pytest.raises(InvalidArgumentError, match="group=2, group_channels=3"):
        extension.dcnv3_forward(x, offset, mask, *GEOMETRY[:-2], 3, 1.0, STEP, 0)
    with pytest.raises(InvalidArgumentError, match="stride is out of range"):
        extension.dcnv3_forward(x, offset, mask, 3, 3, 0, *GEOMETRY[3:], STEP, 0)
    with pytest.raises(TypeError):
        extension.dcnv3_forward(x, offset, mask, *GEOMETRY)
