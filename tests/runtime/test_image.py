"""Preprocessing of images, and classes from logits."""

import contextlib
import io
import itertools
import os
import random

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


RAMP = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)


def tiff(values, **tags):
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", **tags)
    return stream.getvalue()


def test_16_bits_are_scaled(tmp_path):
    expected = runtime.preprocess(np.rint(RAMP / 257).astype(np.uint8), SETTINGS)
    sources = [RAMP, RAMP.astype(">u2"), tiff(RAMP)]
    for suffix in ("png", "tif", "pgm"):
        sources.append(tmp_path / f"ramp.{suffix}")
        Image.fromarray(RAMP).save(sources[-1])
    for values in runtime.preprocess(sources, SETTINGS):
        np.testing.assert_array_equal(values, expected[0])
    inverted = runtime.preprocess(tiff(RAMP, tiffinfo={262: 0}), SETTINGS)
    np.testing.assert_array_equal(inverted, runtime.preprocess(65535 - RAMP, SETTINGS))


def test_32_bits_need_a_range():
    expected = runtime.preprocess(RAMP, SETTINGS)
    unit = (RAMP / 65535).astype(np.float32)
    for values, value_range in ((unit, (0, 1)), (RAMP.astype(np.int32), (0, 65535))):
        for source in (values, tiff(values), Image.fromarray(values)):
            with pytest.raises(ImageError, match="value_range"):
                runtime.preprocess(source, SETTINGS)
            found = runtime.preprocess(source, SETTINGS, value_range=value_range)
            np.testing.assert_array_equal(found, expected)
    for bad in ((1, 1), (0, np.nan), 3, "ab", (0, 1, 2)):
        with pytest.raises(InvalidArgumentError, match="value_range"):
            runtime.preprocess(unit, SETTINGS, value_range=bad)
    unit[0, 0] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        runtime.preprocess(unit, SETTINGS, value_range=(0, 1))


def test_bytes_and_open_files(photo):
    expected = runtime.preprocess(photo, SETTINGS)
    with open(photo, "rb") as file:
        content = file.read()
        for source in (content, bytearray(content), io.BytesIO(content), file):
            np.testing.assert_array_equal(runtime.preprocess(source, SETTINGS), expected)
    with open(__file__) as text, pytest.raises(ImageError, match="text mode"):
        runtime.preprocess(text, SETTINGS)


def test_bad_item_of_a_list_is_named(photo):
    with pytest.raises(ImageError, match=r"item 2 of the 3 images: .*does not exist"):
        runtime.preprocess([photo, photo, "missing.jpg"], SETTINGS)


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
        np.zeros((4, 4), bool),
        np.zeros((4, 4), complex),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        b"",
        None,
        7,
    ],
)
def test_not_an_image(bad):
    with pytest.raises(ImageError):
        runtime.preprocess(bad, SETTINGS)


def test_no_images_make_an_empty_batch():
    assert runtime.preprocess([], SETTINGS).shape == (0, 3, *SETTINGS["crop"])


def test_not_an_image_file(tmp_path, photo):
    with pytest.raises(ImageError, match="does not exist"):
        runtime.preprocess(tmp_path / "missing.jpg", SETTINGS)
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(ImageError, match="not a regular file"):
            runtime.preprocess(path, SETTINGS)
    text, cut, empty = tmp_path / "text.jpg", tmp_path / "cut.jpg", tmp_path / "empty.png"
    text.write_text("not an image")
    with open(photo, "rb") as stream:
        cut.write_bytes(stream.read()[:20000])
    empty.write_bytes(b"")
    for path in (text, cut, empty):
        with pytest.raises(ImageError, match=path.name):
            runtime.preprocess(path, SETTINGS)


ODD_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "LAB", "I;16", "F")
ODD_FORMATS = ("AVIF", "BMP", "DDS", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TIFF", "WEBP")


def odd_files():
    """Yield the content of files of many formats and modes, some of them damaged."""
    generator = random.Random(15)
    for name, mode in itertools.product(ODD_FORMATS, ODD_MODES):
        stream = io.BytesIO()
        with contextlib.suppress(OSError, ValueError, KeyError):  # If the format lacks the mode.
            Image.new(mode, (generator.randint(1, 9), generator.randint(1, 9))).save(stream, name)
        content = bytearray(stream.getvalue())
        yield bytes(content)
        yield bytes(content[: generator.randrange(len(content) + 1)])
        for position in generator.sample(range(len(content)), min(5, len(content))):
            content[position] = generator.randrange(256)
        yield bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_odd_files_give_a_result_or_an_image_error():
    results = []
    for content in odd_files():
        with contextlib.suppress(ImageError):
            results.append(runtime.preprocess(content, SETTINGS, value_range=(0, 1)))
    assert len(results) > 80
    assert all(np.isfinite(batch).all() for batch in results)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="bomb"):
        runtime.preprocess(path, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": 0}, "resize is out of range; got 0"),
        ({"crop": [8, 8, 8]}, "crop is not"),
        ({"crop": [10**9, 8]}, "crop is out of range"),
        ({"mean": [0.5]}, "mean is invalid"),
        ({"std": [1, 0, 1]}, "std is invalid.*above 0"),
        ({"std": [1, 10**400, 1]}, "std is not a finite number"),
        ({"interpolation": "magic"}, "interpolation is unknown; got 'magic'; allowed: bicubic"),
        ({"layout": ["NCHW"]}, "layout is unknown"),
    ],
)
def test_invalid_settings(photo, change, message):
    with pytest.raises(InvalidArgumentError, match=message):
        runtime.preprocess(photo, SETTINGS | change)
    with pytest.raises(InvalidArgumentError, match="incomplete or unknown; got no crop, no mean"):
        runtime.preprocess(photo, {"resize": 8, "std": [1, 1, 1]})


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
    from_bfloat16, _ = runtime.top_k(torch.from_numpy(logits).bfloat16().requires_grad_(), k=3)
    np.testing.assert_array_equal(from_bfloat16, classes)
    names, _ = runtime.top_k(logits.astype(">f4"), np.int64(2), labels=("a", "b", "c", "d"))
    assert names.tolist() == [["b", "c"], ["a", "d"]]
    for result in runtime.top_k(logits[:0], k=3):
        assert result.shape == (0, 3)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (np.zeros((1, 4)), {"k": 0}, "at least 1 and at most 4"),
        (np.zeros((1, 4)), {"k": 5}, "at least 1 and at most 4"),
        (np.zeros((1, 4)), {"k": 2.0}, "at least 1 and at most 4"),
        (np.zeros(4), {}, "not a matrix"),
        (np.zeros((1, 8), complex), {}, "not a matrix of real numbers; got complex128"),
        (np.array([[0, np.nan] * 3]), {}, "NaN"),
        (np.array([[0, np.inf] * 3]), {}, "a maximum of inf"),
        (np.full((1, 8), -np.inf), {}, "a maximum of -inf"),
        ({"logits": np.zeros((1, 8))}, {}, "not a tensor; got builtins.dict.*outputs"),
        (np.zeros((1, 8)), {"labels": ["cat"]}, "got 1 labels; allowed: 8"),
    ],
)
def test_invalid_logits_are_rejected(logits, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        runtime.top_k(logits, **options)
