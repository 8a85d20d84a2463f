"""Sampling points out of PyTorch models and artifacts."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, visualize
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import dcnv3_loops
from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.size_expressions import evaluate_size
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.compare import ReferenceOperator, compare
from dcnv3_tvm.verify.entries import entry_outputs
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.visualize.block_sampling import SampledBlock, number_blocks
from dcnv3_tvm.visualize.capture_module import from_module
from helpers.published_style_models import DCNv3Cuda, DCNv3Pytorch, Detector

pytestmark = pytest.mark.usefixtures("unoptimized")

SIZE = (18, 26)


class Blocks(nn.Module):
    """Two blocks at stride 2, one with a stride, and one at stride 4 without the softmax inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first = DCNv3(8, group=2, offset_scale=2.0, remove_center=True)
        self.second = DCNv3(8, group=4, softmax=True)
        self.down = DCNv3(8, group=1, stride=2)
        self.last = DCNv3(8, group=2, kernel_size=5, center_feature_scale=True)

    def forward(self, image):
        x = self.stem(image).permute(0, 2, 3, 1)
        x = x + self.first(x)
        x = self.down(x + self.second(x))
        return (x + self.last(x)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def model():
    return randomize_(Blocks().eval().requires_grad_(False), seed=3)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(5).standard_normal((1, 3, *SIZE)).astype("float32")


@pytest.fixture(scope="module")
def compiled(model):
    imported = frontend.import_model(
        model,
        example=(1, 3, *SIZE),
        features="never",
        preprocessing={"mean": [0] * 3, "std": [1] * 3},
    )
    return dt.compile_model(imported, expose="offsets")


@pytest.fixture(scope="module")
def blocks(model, image):
    with ReferenceOperator():
        return visualize.capture_sampling(model, image)


def bilinear(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Sample x (H, W, C) at points (..., 2), x before y; outside are zeros."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    limits = np.array([x.shape[1], x.shape[0]])
    place = np.clip(points, -1, limits) + 1
    first = np.minimum(np.floor(place).astype(int), limits)
    part = place - first
    left, top = first[..., 0], first[..., 1]
    across, down = part[..., :1], part[..., 1:]
    upper = padded[top, left] * (1 - across) + padded[top, left + 1] * across
    lower = padded[top + 1, left] * (1 - across) + padded[top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


def test_weighted_samples_at_the_points_are_the_operator(model, image, blocks, rng):
    with ReferenceOperator():
        sampled_blocks = from_module(model, image)
    for sampled, block in zip(sampled_blocks, blocks, strict=True):
        x = rng.standard_normal((1, *sampled.size, 4 * sampled.params.group))
        spec = DCNv3Spec.of(x.shape, **sampled.params.keywords())
        expected = dcnv3_loops(x, sampled.offset, sampled.mask, spec)[0]
        groups = np.split(x[0], block.params.group, axis=-1)
        samples = np.stack(
            [bilinear(part, block.points[..., g, :, :]) for g, part in enumerate(groups)], axis=2
        )
        found = (block.weights[..., None] * samples).sum(axis=3).reshape(expected.shape)
        # Points are stored in float32: they are off by up to 1e-6 pixels.
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stages_strides_and_displacement(blocks):
    assert [(each.stage, each.block) for each in blocks] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [each.size for each in blocks] == [(9, 13)] * 3 + [(5, 7)]
    assert [each.stride for each in blocks] == [(2, 2)] * 3 + [(4, 4)]
    assert blocks[2].output_size == (5, 7)
    assert blocks[2].output_stride == (4, 4)
    for each in blocks:
        np.testing.assert_allclose(each.weights.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(each.points_in_image, each.points * each.stride[0])
        lengths = np.hypot(*np.moveaxis(each.displacement, -1, 0)) * each.stride[0]
        np.testing.assert_allclose(each.offset_length, lengths, rtol=1e-5)
    # The scaled grid is part of where the points are, not of the displacement.
    centre = blocks[0].points - blocks[0].displacement
    np.testing.assert_allclose(centre[3, 5, 0, 0], (5 - 2, 3 - 2), atol=1e-5)
    assert blocks[3].nearest_position(*blocks[3].position_in_image(4, 6)) == (4, 6)
    assert blocks[3].nearest_position(-5, 100) == (0, 6)


@pytest.mark.slow
def test_module_and_artifact_agree(image, blocks, compiled):
    exposed = visualize.capture_sampling(compiled, torch.from_numpy(image))
    assert len(exposed) == len(blocks)
    for ours, theirs in zip(exposed, blocks, strict=True):
        for field in dataclasses.fields(ours):
            found, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name in ("points", "weights"):
                np.testing.assert_allclose(found, expected, atol=1e-4)
            else:
                assert found == expected, field.name


@pytest.mark.slow
def test_exposing_changes_neither_outputs_nor_weights(model, image, compiled):
    plain = dt.compile_model(frontend.import_model(model, example=(1, 3, *SIZE), features="never"))
    np.testing.assert_array_equal(compiled(image), plain(image))
    main, offsets = (compiled.metadata.entries[name] for name in ("main", "offsets"))
    assert main == plain.metadata.entries["main"]
    assert set(offsets.weights) < set(main.weights)
    assert entry_outputs(compiled, image).keys() == {"main"}
    assert all(row.within("float32") for row in compare(compiled, model, image))
    with pytest.raises(InvalidArgumentError, match=r"entries main.*--expose offsets"):
        visualize.capture_sampling(plain, image)


@pytest.mark.slow
def test_command_takes_an_artifact(compiled, tmp_path, capsys):
    pixels = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    compiled.save(tmp_path / "artifact")
    words = ["visualize", "artifact", "photo.png", "-o", "page.html", "--json"]
    paths = [str(tmp_path / word) if "." in word or word == "artifact" else word for word in words]
    assert main(paths) == 0
    sampled = visualize.capture_sampling(compiled, compiled.preprocess(tmp_path / "photo.png"))
    rows = json.loads(capsys.readouterr().out)["blocks"]
    assert [row["mean_offset"] for row in rows] == [
        float(each.offset_length.mean()) for each in sampled
    ]
    assert "<title>blocks on photo.png</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("core", [DCNv3Pytorch, DCNv3Cuda])
def test_published_modules_are_captured(core, image):
    model = randomize_(Detector(core), seed=2)
    offsets = []
    for block in model.blocks:
        block.dcn.offset.register_forward_hook(lambda *call: offsets.append(call[-1].detach()))
    found = visualize.capture_sampling(model, image)
    assert [(each.stage, each.stride) for each in found] == [(0, (2, 2)), (1, (4, 4))]
    for block, offset in zip(found, offsets[-2:], strict=True):
        expected = offset[0].reshape(block.displacement.shape)
        np.testing.assert_allclose(block.displacement, expected, atol=1e-5)


def test_dynamic_sizes():
    """The size of what a strided DCNv3 samples does not follow from that of its result."""
    model = nn.Sequential(Blocks().stem, ChannelsLast(), DCNv3(8, group=2, stride=2)).eval()
    imported = frontend.import_model(model, example=(1, 3, 32, 32), dynamic_size=True)
    program, _ = pipeline.run_pipeline(
        imported, resolve_target("auto"), expose=True, until="expose_offsets"
    )
    entry = program.entries["offsets"]
    assert [output.name for output in entry.outputs] == ["offset_0", "mask_0"]
    (block,) = entry.blocks
    assert block.params == DCNv3Params(group=2, stride=2)
    for height, width in ((18, 26), (17, 25), (19, 40)):
        values = entry.inputs[0].dynamic_sizes((1, 3, height, width))
        expected = [(height + 1) // 2, (width + 1) // 2]
        assert [evaluate_size(size, values) for size in block.size] == expected


@pytest.mark.parametrize("text", ["h +", "h ** 2", "x", "h // 0", "f(h)", "1.5", "h; h", "(" * 500])
def test_sizes_that_cannot_be_computed(text):
    with pytest.raises(ValueError, match="is not a size computed from h"):
        evaluate_size(text, {"h": 3})


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def zero_offsets(size, **options):
    params = DCNv3Params(group=1, **options)
    shape = [1, *(params.output_extent(extent, axis) for axis, extent in enumerate(size))]
    offset, mask = (np.zeros((*shape, c)) for c in (params.offset_channels, params.mask_channels))
    return SampledBlock(params, size, offset, mask)


def test_maps_begin_elsewhere_without_padding():
    """Positions lie in the middle of what they sample, whatever the padding."""
    found = number_blocks(
        [
            zero_offsets((16, 20), pad=0),
            zero_offsets((14, 18), kernel_size=(5, 3), pad=(3, 1), dilation=(1, 2)),
            zero_offsets((16, 16), pad=2, stride=2),
            zero_offsets((9, 9)),
            zero_offsets((5, 5), pad=0, remove_center=True),
        ],
        (64, 80),
    )
    assert [each.stride for each in found] == [(4, 4)] * 3 + [(8, 8), (16, 16)]
    # By hand: 4 more for each pixel that the middle of the first kernel is off.
    assert [each.origin for each in found] == [(0, 0), (4, 4), (0, 8), (-4, 4), (-4, 4)]
    assert found[-1].output_origin == (12, 20)
    for block in found:
        middle = block.points_in_image.mean(axis=(2, 3))
        for y, x in np.ndindex(block.output_size):
            np.testing.assert_allclose(block.position_in_image(y, x), middle[y, x, ::-1], atol=1e-4)
            assert block.nearest_position(*block.position_in_image(y, x)) == (y, x)
        assert block.nearest_position(-1e3, 1e3) == (0, block.output_size[1] - 1)


def test_wrong_arguments(model, image):
    with pytest.raises(InvalidArgumentError, match=r"shape \(2, 3, 18, 26\)"):
        visualize.capture_sampling(model, image.repeat(2, axis=0))
    with pytest.raises(InvalidArgumentError, match="no DCNv3"):
        visualize.capture_sampling(nn.Conv2d(3, 4, 1), image)
    with pytest.raises(InvalidArgumentError, match="'masks'; allowed: 'offsets'"):
        dt.compile_model(frontend.import_model(model, example=(1, 3, *SIZE)), expose="masks")
