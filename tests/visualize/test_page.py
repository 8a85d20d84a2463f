"""The page: what is in it, and how it behaves in a browser."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.visualize import receptive_field, render_page
from dcnv3_tvm.visualize.page import MAX_BYTES
from helpers import browser


def page_data(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def decoded(text: str, scale: float) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i2") * scale


def test_page_holds_photo_points_and_weights(blocks, photo):
    page = render_page(blocks, photo, title="a <model> & 'photo'")
    assert "<title>a &lt;model&gt; &amp; &#x27;photo&#x27;</title>" in page
    assert "{{" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page), "it would load something"
    data = page_data(page)
    kind, _, content = data["photo"].partition(",")
    assert kind == "data:image/png;base64"
    shown = PIL.Image.open(io.BytesIO(base64.b64decode(content)))
    np.testing.assert_array_equal(np.asarray(shown), photo)
    for stored, block in zip(data["blocks"], blocks, strict=True):
        shifts = decoded(stored["displacement"], stored["scale"])
        np.testing.assert_allclose(
            shifts.reshape(block.points.shape), block.displacement, atol=stored["scale"]
        )
        assert stored["scale"] < 2e-4  # pixels
        weights = decoded(stored["weights"], stored["weight_scale"])
        np.testing.assert_allclose(weights.reshape(block.weights.shape), block.weights, atol=5e-5)


def test_page_is_bounded_and_says_what_is_left_out(blocks, photo):
    sizes = [6 * block.weights.size for block in blocks]
    page = render_page(blocks, photo, title="", max_bytes=sum(sizes) - 1)
    data = page_data(page)
    assert [(each["stage"], each["block"]) for each in data["blocks"]] == [(0, 1), (1, 0), (2, 0)]
    assert "stage.block: 0.0." in data["about"]
    deepest = page_data(render_page(blocks, photo, title="", max_bytes=sizes[-1]))
    assert [each["stage"] for each in deepest["blocks"]] == [2]
    with pytest.raises(InvalidArgumentError, match="smaller image"):
        render_page(blocks, photo, title="", max_bytes=sizes[-1] - 1)
    assert MAX_BYTES * 4 / 3 < 11e6


def test_titles_are_text(blocks, photo):
    page = render_page(blocks, photo, title='{{data}} "><!--<script> \udcff')
    title = "{{data}} &quot;&gt;&lt;!--&lt;script&gt; \\udcff"
    assert page.count(title) == 2
    page.encode("utf-8")
    assert page_data(page)["blocks"]


def test_points_that_are_far_off_leave_others_their_digits(blocks, photo):
    points = blocks[0].points.copy()
    points[0, 0, 0, 0] = np.nan
    points[1, 2, 0, 0] = 1e9
    (stored,) = page_data(
        render_page([dataclasses.replace(blocks[0], points=points)], photo, title="")
    )["blocks"]
    assert stored["grid"][0] == [-1, -1]
    shifts = decoded(stored["displacement"], stored["scale"]).reshape(points.shape)
    np.testing.assert_allclose(shifts[2:], blocks[0].displacement[2:], atol=2e-3)
    assert shifts[1, 2, 0, 0, 0] == pytest.approx(8 * 16)


def test_large_photos_are_compressed(blocks):
    photo = np.zeros((192, 256, 3), np.uint8)
    assert page_data(render_page(blocks, photo, title=""))["photo"].startswith("data:image/jpeg")


PLACES = """[...document.querySelectorAll("#overlay .point")].map(each =>
    [Number(each.getAttribute("cx")), Number(each.getAttribute("cy"))])"""
STATUS = "document.getElementById('status').textContent"
BOX = "(({left, top, width, height}) => [left, top, width, height])"


@pytest.mark.slow
@pytest.mark.skipif(
    browser.PROGRAM is None, reason="no browser: apt-get install chromium-headless-shell"
)
def test_page_in_a_browser(blocks, photo, tmp_path):
    path = tmp_path / "page.html"
    # As after a DCNv3 without padding.
    blocks = tuple(
        dataclasses.replace(each, origin=(1.0, 1.5)) if each.stage == 1 else each for each in blocks
    )
    path.write_text(render_page(blocks, photo, title="blocks"), encoding="utf-8")
    with browser.Browser() as tab:
        for width in (1600, 360):
            tab.resize(width, 1000)
            tab.open(path)
            check_layout(tab, width)
            check_pointer(tab, blocks)
        check_keyboard(tab, blocks)
        check_choices(tab, blocks)
        check_receptive_field(tab, blocks)
        check_dark(tab)
        assert tab.messages == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}


def check_layout(tab, width):
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    left, _, picture, _ = tab.evaluate(
        f"{BOX}(document.querySelector('#picture').getBoundingClientRect())"
    )
    panel, *_ = tab.evaluate(f"{BOX}(document.querySelector('.panel').getBoundingClientRect())")
    assert (panel >= left + picture) == (width == 1600), "the panel is beside or below the picture"
    assert picture > 0.5 * min(width, 1000)


def check_pointer(tab, blocks):
    """Move the pointer to pixels of the image; the points are those of the position there."""
    block, shown = blocks[2], []
    photo = tab.evaluate(f"{BOX}(document.querySelector('#photo').getBoundingClientRect())")
    for y, x in ((0, 0), (3, 5)):
        pixel = np.array(block.position_in_image(y, x)) + 0.5
        tab.move_pointer(photo[0] + pixel[1] * photo[2] / 64, photo[1] + pixel[0] * photo[3] / 48)
        assert f"row {y}, column {x} of 6 x 8" in tab.evaluate(STATUS)
        found = np.array(sorted(tab.evaluate(PLACES)))
        expected = block.points_in_image[y, x].reshape(-1, 2)
        np.testing.assert_allclose(found, np.array(sorted(expected.tolist())), atol=2e-3)
        shown.append(found)
    assert np.abs(shown[0] - shown[1]).max() > 1


def check_keyboard(tab, blocks):
    tab.evaluate("document.querySelector('h1').scrollIntoView()")
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "picture"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, shift, place in (
        ("Home", False, "row 3, column 0"),
        ("ArrowRight", False, "row 3, column 1"),
        ("ArrowRight", True, "row 3, column 5"),
        ("ArrowUp", False, "row 2, column 5"),
        ("End", False, "row 2, column 7"),
        ("ArrowRight", False, "row 2, column 7"),
        ("PageUp", False, "Stage 0, block 1, all groups: row 4, column 14"),
        ("PageDown", False, "Stage 1, block 0, all groups: row 2, column 7"),
    ):
        tab.press(key, shift=shift)
        assert place in tab.evaluate(STATUS), key
    assert len(tab.evaluate(PLACES)) == 9 * blocks[2].params.group


def choose(tab, name, value):
    tab.evaluate(
        f"{{ const each = document.getElementById('{name}'); each.value = '{value}'; "
        "each.dispatchEvent(new Event('change')); }"
    )


def check_choices(tab, blocks):
    choose(tab, "stage", 2)
    assert "Stage 2, block 0" in tab.evaluate(STATUS)
    choose(tab, "stage", 0)
    assert "Stage 0, block 1" in tab.evaluate(STATUS)
    choose(tab, "block", 0)
    choose(tab, "group", 1)
    assert "Stage 0, block 0, group 1" in tab.evaluate(STATUS)
    assert len(tab.evaluate(PLACES)) == 9
    groups = "document.querySelectorAll('#groups button')"
    assert tab.evaluate(f"{groups}.length") == blocks[0].params.group
    tab.evaluate(f"{groups}[0].click()")
    assert "group 0" in tab.evaluate(STATUS)
    assert tab.evaluate("document.getElementById('group').value") == "0"
    tab.evaluate(f"{groups}[0].click()")
    assert "all groups" in tab.evaluate(STATUS)


def check_receptive_field(tab, blocks):
    choose(tab, "stage", 2)
    tab.evaluate("document.querySelector('input[value=field]').click()")
    found = re.search(r"row (\d+), column (\d+)", tab.evaluate(STATUS))
    last = receptive_field(blocks, 3, int(found[1]), int(found[2]))[-1]
    facts = tab.evaluate("document.getElementById('facts').textContent")
    assert f"Share on the map{100 * last.contribution.sum():.1f} %" in facts
    assert tab.evaluate("[heat.width, heat.height]") == [16, 12]
    legend = tab.evaluate("document.getElementById('legend-high').textContent")
    assert float(legend.removesuffix(" %")) == float(f"{100 * last.contribution.max():.2g}")
    tab.evaluate("document.querySelector('input[value=length]').click()")
    legend = float(tab.evaluate("document.getElementById('legend-high').textContent"))
    assert abs(legend - blocks[3].offset_length.mean(axis=(2, 3)).max()) < 0.06


def check_dark(tab):
    colours = []
    for dark in (True, False):
        tab.set_dark(dark)
        script = "getComputedStyle(document.body)"
        colours.append(tab.evaluate(f"[{script}.backgroundColor, {script}.color]"))
    levels = np.array([[int(re.search(r"\d+", each)[0]) for each in pair] for pair in colours])
    assert levels[0, 0] < 60 < 180 < levels[0, 1]
    assert levels[1, 1] < 60 < 180 < levels[1, 0]
