"""Fine-tune the trained model for a new task, dark digits on photographs, and compile the result.

    python examples/fine_tune.py [--steps 300] [--checkpoint FILE]

Starts from the weights of train_digits.py, which were trained with white digits on black. The
backgrounds are pieces of one of scikit-learn's photographs; the accuracy is measured with held-out
digits on pieces of the other one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from digits import SIZE, accuracy, check_compiled, draw, load, normalise, train
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor

from dcnv3_tvm import frontend

WEIGHTS = Path(__file__).parent / "digits_internimage.safetensors"


class OnPhotograph:
    """A task: digits in black on random pieces of a brightened photograph."""

    def __init__(self, name: str) -> None:
        pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
        self.photograph = 0.4 + 0.6 * pixels / 255

    def __call__(self, digits: Tensor, generator: Generator) -> Tensor:
        """Make the images of a batch."""
        _, height, width = self.photograph.shape
        pieces = []
        for _ in range(len(digits)):
            top = int(torch.randint(height - SIZE, (), generator=generator))
            left = int(torch.randint(width - SIZE, (), generator=generator))
            pieces.append(self.photograph[:, top : top + SIZE, left : left + SIZE])
        ink = draw(digits, generator, fragments=1)
        return normalise(torch.stack(pieces) * (1 - ink))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="batches of 64 (default: 300)")
    parser.add_argument("--checkpoint", type=Path, default=WEIGHTS, help="weights to start from")
    arguments = parser.parse_args()
    digits, held_out = load()
    known, new = OnPhotograph("china.jpg"), OnPhotograph("flower.jpg")

    # Step 1. Load the weights. A model is created for inference, with frozen parameters.
    model = frontend.create_model("digits_internimage", checkpoint=arguments.checkpoint)
    print(f"held-out accuracy before: {accuracy(model, held_out, new):.2f} %")

    # Step 2. Train all parameters, with a lower learning rate than from scratch.
    model.requires_grad_(True)
    train(model, digits, known, steps=arguments.steps, rate=2e-3)

    # Step 3. Compile the result, in float32 and bfloat16.
    passed = check_compiled(model, held_out, new)
    print("the compiled models are as accurate" if passed else "a compiled model is LESS accurate")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
