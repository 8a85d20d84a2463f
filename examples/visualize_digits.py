"""Draw how the trained digits model samples: the pictures of the documentation, and its page.

    python examples/visualize_digits.py [--output docs/images]

Four held-out digits in one image, of twice the size of the images that the model was trained with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from digits import SIZE, draw, load, normalise
from PIL import Image
from torch import Generator, Tensor

from dcnv3_tvm import frontend, visualize
from dcnv3_tvm.frontend.models.config import IMAGENET_MEAN, IMAGENET_STD
from dcnv3_tvm.visualize.page import page_data

WEIGHTS = Path(__file__).with_name("digits_internimage.safetensors")
DIGITS = (3, 12, 8, 5)
"""Which of the held-out digits."""

AT = (32.0, 32.0)
"""Pixel (y, x) whose sampling is shown: between the digits."""


def four_digits() -> Tensor:
    """Return an image (1, 3, 2*SIZE, 2*SIZE) of four digits among fragments."""
    _, held_out = load()
    drawn = normalise(draw(held_out.images[:40], Generator().manual_seed(7)))
    rows = [torch.cat([drawn[i] for i in pair], dim=-1) for pair in (DIGITS[:2], DIGITS[2:])]
    return torch.cat(rows, dim=-2)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    # Step 1. Run the model on the image, and keep where each block samples.
    model = frontend.create_model("digits_internimage", checkpoint=WEIGHTS)
    image = four_digits()
    blocks = visualize.capture_sampling(model, image)

    # Step 2. The image as the model sees it.
    settings = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop": 2 * SIZE, "resize": 2 * SIZE}
    photo = visualize.photo_of(image.numpy(), settings)

    # Step 3. A picture of each kind, and what the page shows: `render_page` would return the page,
    # but the documentation is built with this, so that its page has the package's script.
    pictures = {kind: folder / f"{kind}.png" for kind in visualize.PICTURES}
    for kind, path in pictures.items():
        figure = visualize.draw_picture(kind, blocks, photo, at=AT)
        visualize.save_picture(figure, path)
        # A palette halves the file.
        Image.open(path).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=3).save(
            path, optimize=True
        )
    page = folder / "page.json"
    page.write_text(json.dumps(page_data(blocks, photo)) + "\n", encoding="utf-8")
    for path in (*pictures.values(), page):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
