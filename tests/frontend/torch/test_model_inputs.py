"""Inputs of models: several, lists, dicts, other ranks and types, and dynamic sizes of all."""

import numpy as np
import pytest
import torch
from torch import nn

from dcnv3_tvm import compile_model
from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend import import_model
from dcnv3_tvm.frontend.torch.model_inputs import ModelInputs
from dcnv3_tvm.pytorch.dcnv3_module import DCNv3
from dcnv3_tvm.verify.compare import difference
from dcnv3_tvm.verify.random_weights import randomize_

pytestmark = pytest.mark.usefixtures("unoptimized")


class Detector(nn.Module):
    """A U-Net with BatchNorm on frames, an image and a number; boxes from cached anchors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8))
        self.dcn = DCNv3(8, group=2)
        self.fuse = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.classes = nn.Embedding(5, 8)
        self.size = self.anchors = None

    def forward(self, frames, *, thermal, number):
        fine = self.first(frames[0] - frames[1] + thermal)
        coarse = self.dcn(self.second(fine).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        fused = self.fuse(torch.cat([nn.functional.interpolate(coarse, scale_factor=2), fine], 1))
        fused = fused + self.classes(number)[:, :, None, None]
        if self.size != fused.shape[2:]:
            self.size = fused.shape[2:]
            rows, columns = (torch.arange(size, dtype=torch.float32) for size in self.size)
            grid = torch.meshgrid(columns + 0.5, rows + 0.5, indexing="xy")
            self.anchors = torch.stack(grid).flatten(1)
        bins, rest = fused.flatten(2).split((6, 2), 1)
        expected = bins.unflatten(1, (2, 3)).softmax(2) * torch.arange(3.0)[:, None]
        return {"boxes": self.anchors - expected.sum(2), "scores": rest.sigmoid()}


SHAPE = (1, 3, 16, 32)


def arguments(batch, height, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    first, second, third = (
        torch.rand((batch, 3, height, width), generator=random) for _ in range(3)
    )
    return {"frames": [first, second], "thermal": third, "number": torch.arange(batch) % 5}


@pytest.fixture(scope="module")
def detector():
    return randomize_(Detector().eval(), 1)


@pytest.fixture(scope="module")
def imported(detector):
    return import_model(detector, example=arguments(1, 16, 32), dynamic_batch=True, dynamic_size=16)


def test_signature_names_each_input(imported):
    image = ("n", 3, "16*h", "16*w")
    described = [(info.name, info.shape, info.dtype) for info in imported.entries["main"].inputs]
    assert described == [
        ("frames.0", image, "float32"),
        ("frames.1", image, "float32"),
        ("thermal", image, "float32"),
        ("number", ("n",), "int64"),
    ]
    assert [output.name for output in imported.entries["main"].outputs] == ["boxes", "scores"]


def test_multiples_of_a_size(detector, imported):
    compiled = compile_model(imported)
    for batch, height, width in ((1, 16, 16), (2, 48, 32), (3, 16, 80)):
        given = arguments(batch, height, width, seed=batch)
        detector.size = None
        with torch.no_grad():
            expected = detector(**given)
        frames = {f"frames.{i}": frame for i, frame in enumerate(given.pop("frames"))}
        outputs = compiled(**frames, **given)
        for name, tensor in expected.items():
            found = difference(name, outputs[name].numpy(), tensor.numpy())
            assert found.within("float32")
    frames = np.zeros((1, 3, 16, 24), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"axis 3 of frames\.0 is not a multiple of 16"):
        compiled(frames, frames, frames, np.zeros(1, np.int64))
    with pytest.raises(InvalidArgumentError, match="got 1 by position, thermal; allowed: 4: fr"):
        compiled(frames, thermal=frames)
    none = np.zeros((0, 3, 16, 16), np.float32)
    outputs = compiled(none, none, none, np.zeros(0, np.int64))
    shapes = {name: output.shape for name, output in outputs.items()}
    assert shapes == {"boxes": (0, 2, 64), "scores": (0, 2, 64)}


class UNet(nn.Module):
    """Runs only for sizes that are multiples of 4."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8))
        self.dcn = DCNv3(8, group=2)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        fine = self.first(x)
        coarse = self.dcn(self.second(fine).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        up = nn.functional.interpolate(coarse, scale_factor=2)
        return self.norm(torch.cat([up, fine], 1))


def test_needed_multiple_is_found():
    (image,) = import_model(UNet(), example=(1, 3, 8, 12), dynamic_size=True).entries["main"].inputs
    assert image.shape == (1, 3, "4*h", "4*w")


class PadsToMultiples(UNet):
    """Accepts any size, with a decision that depends on it."""

    def forward(self, x):
        if x.shape[2] % 8:
            x = nn.functional.pad(x, (0, 0, 0, -x.shape[2] % 8))
        return super().forward(x)


def test_decision_by_size_needs_the_multiple():
    with pytest.raises(ModelImportError, match=r"\(h % 8\) == 0.*--dynamic-size 8"):
        import_model(PadsToMultiples(), example=(1, 3, 8, 12), dynamic_size=True)
    imported = import_model(PadsToMultiples(), example=(1, 3, 8, 8), dynamic_size=8)
    assert imported.entries["main"].inputs[0].shape == (1, 3, "8*h", "8*w")


class Optional(nn.Module):
    def forward(self, a, b=None):
        return a, b


class Several(nn.Module):
    def forward(self, *images):
        return images


class TakesMetadata(nn.Module):
    def forward(self, img, img_metas, return_loss=True, **kwargs):
        return img, img_metas, return_loss, kwargs


def describe(model, example, *, dynamic_batch=False, multiple=0):
    return ModelInputs.of(model, example, dynamic_batch=dynamic_batch, multiple=multiple)


def names_and_shapes(inputs):
    return [(info.name, info.shape) for info in inputs.infos]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ((1, 3, 8, 8), [("image", (1, 3, 8, 8))]),
        (tuple(np.array([1, 3, 8, 8])), [("image", (1, 3, 8, 8))]),
        (np.array([1, 3, 8, 8]), [("image", (1, 3, 8, 8))]),
        (np.zeros((1, 3, 8, 8), ">f4"), [("image", (1, 3, 8, 8))]),
        ((2, 5, 3, 8, 8), [("a", (2, 5, 3, 8, 8))]),
        (((1, 3), torch.zeros(4)), [("a", (1, 3)), ("b", (4,))]),
        ({"b": (1,), "a": {"x": (2,), "y": [(3,)]}}, [("a.x", (2,)), ("a.y.0", (3,)), ("b", (1,))]),
        ([(1, 2), (3, 4)], [("a.0", (1, 2)), ("a.1", (3, 4))]),
    ],
    ids=str,
)
def test_forms_of_examples(example, expected):
    assert names_and_shapes(describe(Optional(), example)) == expected


def test_dynamic_sizes_are_named_by_the_example():
    inputs = describe(
        Several(),
        ((1, 3, 8, 16), (1, 3, 16, 16), (1, 8, 16, 3), (1, 2, 3, 8, 16), (1, 7)),
        dynamic_batch=True,
        multiple=8,
    )
    assert [shape for _, shape in names_and_shapes(inputs)] == [
        ("n", 3, "8*h", "8*w"),
        ("n", 3, "8*h_1", "8*w"),
        ("n", "8*h", "8*w", 3),
        ("n", 2, 3, "8*h", "8*w"),
        ("n", 7),
    ]
    # Sizes of one are doubled, because torch.export specialises on them.
    assert [tuple(example.shape) for example in inputs.examples][:2] == [
        (2, 3, 2, 8, 2, 8),
        (2, 3, 2, 8, 2, 8),
    ]


def test_inputs_that_are_not_tensors_are_named():
    model, image = TakesMetadata(), (1, 3, 8, 8)
    with pytest.raises(ModelImportError, match=r"\(img, img_metas, return_loss.*forward_dummy"):
        describe(model, image)
    with pytest.raises(InvalidArgumentError, match=r"img_metas is not a tensor; got None.*Wrap"):
        describe(model, {"img": image, "img_metas": None})
    with pytest.raises(InvalidArgumentError, match="one batch size; got img: 1, img_metas: 2"):
        describe(model, ((1, 3), (2, 3)), dynamic_batch=True)
    with pytest.raises(InvalidArgumentError, match="h=9, dynamic_size=8; allowed: multiples of 8"):
        describe(Several(), (1, 3, 9, 8), multiple=8)
