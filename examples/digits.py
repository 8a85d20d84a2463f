"""What the digit examples share: the images, the training loop, the accuracy, the compilation.

scikit-learn ships 1,797 handwritten digits of 8x8 pixels. `draw` enlarges, shears, turns and shifts
them on a canvas, among fragments of other digits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.frontend.models.config import IMAGENET_MEAN, IMAGENET_STD
from dcnv3_tvm.targets import has_fast_bfloat16, resolve_target

SIZE: Final = 32
"""Height and width of the canvas, in pixels."""

HELD_OUT: Final = 360
"""Digits, a fifth, that no training run sees: neither as digits nor as fragments."""

COPIES: Final = 10
"""How often the accuracy draws each held-out digit."""

Task = Callable[[Tensor, Generator], Tensor]
"""Makes images (N, 3, SIZE, SIZE), the input of the model, from digits (N, 1, 8, 8)."""


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) between 0 and 1, and labels (N,)."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Return the digits to train with and the held-out ones; the split is always the same."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / data.images.max()
    labels = torch.from_numpy(data.target)[order]
    return (
        Digits(images[HELD_OUT:], labels[HELD_OUT:]),
        Digits(images[:HELD_OUT], labels[:HELD_OUT]),
    )


def draw(digits: Tensor, generator: Generator, *, fragments: int = 3) -> Tensor:
    """Draw each digit on a canvas (N, 1, SIZE, SIZE) with fragments of the others."""
    canvas = _warp(digits, generator, degrees=30, scale=0.7, shift=0.25)
    for _ in range(fragments):
        others = digits[torch.randint(len(digits), (len(digits),), generator=generator)]
        corners = torch.randint(5, (len(digits), 2), generator=generator).tolist()
        windows = [
            image[:, y : y + 4, x : x + 4] for image, (y, x) in zip(others, corners, strict=True)
        ]
        centred = F.pad(torch.stack(windows), (2, 2, 2, 2))
        fragment = _warp(centred, generator, degrees=180, scale=0.45, shift=1.0)
        canvas = canvas.maximum(fragment)
    return canvas


def _warp(
    images: Tensor, generator: Generator, *, degrees: float, scale: float, shift: float
) -> Tensor:
    """Stretch images to about `scale` canvases, shear, turn by up to `degrees`, and shift."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle = uniform(-degrees, degrees) * (math.pi / 180)
    width, height = scale * uniform(0.7, 1.3), scale * uniform(0.7, 1.3)
    shear = uniform(-0.4, 0.4)
    centre = uniform(-shift, shift, 2, 1)  # the canvas goes from -1 to 1
    # affine_grid takes the way back, from the canvas to the image.
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([cosine, sine, -sine, cosine], -1).reshape(count, 2, 2)
    stretch = torch.stack([1 / width, shear / height, 0 * shear, 1 / height], -1)
    back = stretch.reshape(count, 2, 2) @ turn
    theta = torch.cat([back, -back @ centre], dim=-1)
    grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalise(canvas: Tensor) -> Tensor:
    """Normalise RGB or greyscale between 0 and 1 to (N, 3, H, W), as InternImage takes it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (canvas - mean) / std


def cluttered(digits: Tensor, generator: Generator) -> Tensor:
    """Make the images of the training task."""
    return normalise(draw(digits, generator))


def train(
    model: nn.Module,
    digits: Digits,
    task: Task,
    *,
    steps: int,
    rate: float,
    batch: int = 64,
    seed: int = 0,
    show: bool = True,
) -> list[float]:
    """Train with AdamW and a one-cycle learning rate up to `rate`; return the loss of each step."""
    generator = Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.2
    )
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(digits.labels), (batch,), generator=generator)
        logits = model(task(digits.images[chosen], generator))
        loss = F.cross_entropy(logits, digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        shown = max(steps // 10, 1)
        if show and step % shown == 0:
            mean = sum(losses[-shown:]) / shown
            seconds = time.perf_counter() - start
            print(f"step {step:5}  loss {mean:.3f}  {seconds:5.0f} s", flush=True)
    model.eval().requires_grad_(False)
    return losses


def accuracy(predict: Callable[[Tensor], Tensor], held_out: Digits, task: Task) -> float:
    """Return the percentage of right answers on `COPIES` drawings of each held-out digit."""
    generator = Generator().manual_seed(1)
    right = 0
    for _ in range(COPIES):
        logits = predict(task(held_out.images, generator))
        right += int((logits.argmax(1) == held_out.labels).sum())
    return 100 * right / (COPIES * len(held_out.labels))


def check_compiled(model: nn.Module, held_out: Digits, task: Task) -> bool:
    """Compile a trained model, print its accuracy next to PyTorch's, and compare them."""
    expected = accuracy(model, held_out, task)
    print(f"held-out accuracy, PyTorch: {expected:.2f} %")
    imported = frontend.import_model(model, example=(2, 3, SIZE, SIZE), dynamic_batch=True)
    passed = True
    tolerances = {"float32": 0.0}
    if has_fast_bfloat16(resolve_target("auto")):
        tolerances["bfloat16"] = 0.2
    for dtype, allowed in tolerances.items():
        compiled = dt.compile_model(imported, dtype=dtype)
        found = accuracy(compiled, held_out, task)
        print(f"held-out accuracy, compiled in {dtype}: {found:.2f} %")
        passed = passed and abs(found - expected) <= allowed
    return passed
