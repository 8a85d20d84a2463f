"""Preprocessing of images, and classes from logits."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dcnv3_tvm import runtime
from dcnv3_tvm.errors import ImageError, InvalidArgumentError

SETTINGS = {
    "resize": 32,
    "crop": [32, 24],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "layout": "NCHW",
}


@pytest.fixture(scope="module")
def photo():
    return next(name for name in load_sample_images().filenames if name.endswith("china.jpg"))


def test_pixels(photo):
    batch = runtime.preprocess(photo, SETTINGS)
    assert batch.shape == (1, 3, 32, 24)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert batch.ctypes.data % 64 == 0
    opened = Image.open(photo)  # 640 x 427
    resized = opened.resize((int(640 * 32 / 427), 32), Image.Resampling.BICUBIC)
    left = round((resized.width - 24) / 2)
    expected = np.asarray(resized)[:, left : left + 24] / 255
    expected = (expected - SETTINGS["mean"]) / SETTINGS["std"]
    np.testing.assert_allclose(batch[0].transpose(1, 2, 0), expected, atol=1e-5)


def test_paths_pil_images_and_arrays_agree(photo):
    opened = Image.open(photo)
    batch = runtime.preprocess([photo, opened, np.asarray(opened)], SETTINGS)
    assert batch.shape == (3, 3, 32, 24)
    np.testing.assert_array_equal(batch[0], batch[1])
    np.testing.assert_array_equal(batch[0], batch[2])
    channels_last = runtime.preprocess(photo, SETTINGS | {"layout": "NHWC"})
    np.testing.assert_array_equal(channels_last[0].transpose(2, 0, 1), batch[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(photo, dtype):
    batch = runtime.preprocess(photo, SETTINGS, dtype=dtype)
    assert str(batch.dtype) == dtype
    reference = runtime.preprocess(photo, SETTINGS)
    np.testing.assert_allclose(batch.astype(np.float32), reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (33, 32), (20000, 3), (7, 4000), (24, 32)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_size_and_mode(size, mode, tmp_path):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    Image.new(mode, size, color=1).save(path)
    batch = runtime.preprocess(path, SETTINGS)
    assert batch.shape == (1, 3, 32, 24)
    assert np.isfinite(batch).all()


def test_exif_orientation(tmp_path):
    path = tmp_path / "rotated.jpg"
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down.
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    batch = runtime.preprocess(path, SETTINGS)
    assert batch[0, 0, -4:].min() > 1 > -1 > batch[0, 0, :4].max()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        None,
        7,
        [],
    ],
)
def test_not_an_image(bad):
    with pytest.raises(ImageError):
        runtime.preprocess(bad, SETTINGS)


def test_not_an_image_file(tmp_path, photo):
    with pytest.raises(ImageError, match="does not exist"):
        runtime.preprocess(tmp_path / "missing.jpg", SETTINGS)
    with pytest.raises(ImageError):
        runtime.preprocess(tmp_path, SETTINGS)
    text, cut, empty = tmp_path / "text.jpg", tmp_path / "cut.jpg", tmp_path / "empty.png"
    text.write_text("not an image")
    with open(photo, "rb") as stream:
        cut.write_bytes(stream.read()[:20000])
    empty.write_bytes(b"")
    for path in (text, cut, empty):
        with pytest.raises(ImageError, match=path.name):
            runtime.preprocess(path, SETTINGS)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="bomb"):
        runtime.preprocess(path, SETTINGS)


def test_without_settings(photo):
    with pytest.raises(InvalidArgumentError, match="no preprocessing settings"):
        runtime.preprocess(photo, {})


def test_top_k():
    logits = np.array([[0.0, 3.0, 3.0, -1000.0], [1e4, 0.0, -1e4, 1.0]], np.float32)
    classes, probabilities = runtime.top_k(logits, k=3)
    np.testing.assert_array_equal(classes, [[1, 2, 0], [0, 3, 1]])
    np.testing.assert_allclose(probabilities[1], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(probabilities[0].sum(), 1, atol=1e-12)
    import torch

    from_torch, _ = runtime.top_k(torch.from_numpy(logits), k=3)
    np.testing.assert_array_equal(from_torch, classes)
    for bad in (0, 5):
        with pytest.raises(InvalidArgumentError, match="1 to 4"):
            runtime.top_k(logits, k=bad)
    with pytest.raises(InvalidArgumentError, match="shape"):
        runtime.top_k(logits[0])
