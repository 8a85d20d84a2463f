"""Pictures of each kind."""

import dataclasses

import numpy as np
import pytest

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.visualize import PICTURES, draw_picture, photo_of, save_picture
from dcnv3_tvm.visualize.block_sampling import SampledBlock, number_blocks
from helpers.toy import PREPROCESSING


def panels(figure):
    """Return the panels of a figure, without colour bars and empty ones."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.axison]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("points", 3), ("field", 3), ("length", 3), ("arrows", 3), ("groups", 4), ("histogram", 3)],
)
def test_panels_of_each_kind(kind, count, blocks, photo):
    # tests/cli/test_visualize.py writes a file of each.
    assert len(panels(draw_picture(kind, blocks, photo))) == count
    assert kind in PICTURES


def test_points_are_where_the_block_samples(blocks, photo):
    figure = draw_picture("points", blocks, photo, at=(24, 40), index=2, group=3)
    (panel,) = panels(figure)
    (drawn,) = panel.collections
    expected = blocks[2].points_in_image[3, 5, 3]
    np.testing.assert_allclose(
        np.sort(np.asarray(drawn.get_offsets()), axis=0), np.sort(expected, axis=0), rtol=1e-6
    )
    areas = drawn.get_sizes()[np.argsort(drawn.get_array())]
    assert (np.diff(areas) > 0).all(), "the area grows with the weight"


@pytest.mark.parametrize("kind", PICTURES)
def test_values_that_are_not_finite(kind, photo, tmp_path):
    params = DCNv3Params(group=1)
    offset = np.zeros((1, 3, 4, params.offset_channels), np.float32)
    offset[0, 1] = [[np.nan], [np.inf], [3e38], [1e9]]
    mask = np.ones((1, 3, 4, params.mask_channels), np.float32)
    mask[0, 2] = [[np.nan], [-1], [0], [1]]
    broken = number_blocks([SampledBlock(params, (3, 4), offset, mask)], (12, 16))
    # Matplotlib checks values when it draws; warnings fail tests.
    save_picture(draw_picture(kind, broken, photo, at=(8, 4)), tmp_path / "broken.png")
    nowhere = [dataclasses.replace(broken[0], points=np.full_like(broken[0].points, np.nan))]
    draw_picture(kind, nowhere, photo)


def test_svg(blocks, photo, tmp_path):
    path = tmp_path / "picture.svg"
    save_picture(draw_picture("groups", blocks, photo, index=3, group=7), path)
    assert "<svg" in path.read_text(encoding="utf-8")


def test_photo_is_the_image_before_normalisation(rng):
    photo = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mean, std = (np.array(PREPROCESSING[name]) for name in ("mean", "std"))
    image = ((photo / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    np.testing.assert_array_equal(photo_of(image, PREPROCESSING), photo)


def test_wrong_arguments(blocks, photo, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"'pie'; allowed: points, field"):
        draw_picture("pie", blocks, photo)
    for wrong in ({"index": 4}, {"index": 3, "group": 8}, {"group": 2}):
        with pytest.raises(InvalidArgumentError):
            draw_picture("points", blocks, photo, **wrong)
    figure = draw_picture("histogram", blocks, photo)
    for name in ("missing/picture.png", "picture.xyz"):
        with pytest.raises(InvalidArgumentError, match="cannot be written"):
            save_picture(figure, tmp_path / name)
