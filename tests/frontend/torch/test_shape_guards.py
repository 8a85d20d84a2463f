"""Models whose computation depends on the image size."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend import import_model
from dcnv3_tvm.frontend.torch.shape_guards import ShapeGuards
from dcnv3_tvm.pytorch import operator
from dcnv3_tvm.signature import TensorInfo

SHAPE = (2, 3, 18, 26)

Sizes = namedtuple("Sizes", "n c h w")


class DoubledIf(nn.Module):
    """Doubles the images whose sizes satisfy a condition."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, image):
        return image * 2 if self.condition(Sizes(*image.shape)) else image + 1


def export(model, dynamic_axes=(0, 2, 3)):
    dynamic = dict.fromkeys(dynamic_axes, torch.export.Dim.DYNAMIC)
    return torch.export.export(
        model, (torch.zeros(SHAPE),), dynamic_shapes={"image": dynamic}, strict=False
    )


def shape_guards(model, dynamic_axes=(0, 2, 3)):
    names = {axis: "nchw"[axis] for axis in dynamic_axes}
    shape = tuple(names.get(axis, size) for axis, size in enumerate(SHAPE))
    sizes = {name: SHAPE[axis] for axis, name in names.items()}
    image = TensorInfo("image", shape, "float32")
    return ShapeGuards(export(model, dynamic_axes), [image], sizes)


CONDITIONS = {
    "h % 32": (lambda s: s.h % 32, r"\(h % 32\) != 0 \(.*test_shape_guards.py:\d+"),
    "w % 2": (lambda s: s.w % 2, r"\(w % 2\) == 0"),
    "h > 12": (lambda s: s.h > 12, "h > 12"),
    "h == w": (lambda s: s.h == s.w, "(h != w|w != h)"),
    "h * w": (lambda s: s.h * s.w > 300, r"(w\*h|h\*w) > 300"),
    "h / w": (lambda s: s.h / s.w > 0.5, r"\(h / w\) > 0.5"),
    "h - w": (lambda s: s.h - s.w > -20, ""),
    "int(h)": (lambda s: int(s.h * 0.5) > 4, ""),
    "round(h)": (lambda s: round(s.h / 3) > 5, ""),
    "sqrt(h * w)": (lambda s: (s.h * s.w) ** 0.5 > 10, ""),
    "aspect ratio": (lambda s: 9 * s.w == 13 * s.h, ""),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_condition_on_dynamic_size_is_an_error(name):
    condition, guard = CONDITIONS[name]
    with pytest.raises(ModelImportError, match=f"another size; .*where {guard}"):
        shape_guards(DoubledIf(condition)).check()


@pytest.mark.parametrize(
    ("condition", "dynamic_axes"),
    [
        (lambda s: s.h % 32, {0}),
        (lambda s: s.n > 3, {2, 3}),
        (lambda s: s.c == 3, {0, 2, 3}),
    ],
    ids=["height", "batch", "channels"],
)
def test_condition_on_fixed_size_is_accepted(condition, dynamic_axes):
    shape_guards(DoubledIf(condition), dynamic_axes).check()


class SampledIf(DoubledIf):
    """The smallest model with the operator."""

    def forward(self, image):
        x = super().forward(image).permute(0, 2, 3, 1)
        return operator.dcnv3(x, x[..., :2], x[..., :1], group=1, kernel_size=1, pad=0)


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        (lambda s: s.h > 12, "another size; .*where h > 12"),
        (lambda s: s.h > 4000, "larger images; got h <= 4000"),
        (lambda s: s.n > 3, "larger images; got n <= 3"),
        (lambda s: s.h == 18, "torch.export cannot trace"),
    ],
    ids=["guard", "upper bound of h", "upper bound of n", "equality"],
)
def test_import_checks_dynamic_sizes(condition, problem):
    with pytest.raises(ModelImportError, match=problem):
        import_model(SampledIf(condition), example=SHAPE, dynamic_batch=True, dynamic_size=True)


def test_import_accepts_conditions_on_fixed_sizes():
    import_model(SampledIf(lambda s: s.h % 32), example=SHAPE, dynamic_batch=True)
