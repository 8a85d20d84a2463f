"""Train a small InternImage on cluttered digits, save its weights, and compile it.

    python examples/train_digits.py [--steps 600] [--seed 0] [--output FILE]
    python examples/train_digits.py --compare [--seeds 5] [--steps 300]

The first command takes some minutes. The second trains the model from several seeds with learned
offsets and with offsets of zero, and compares the accuracy on held-out digits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from digits import accuracy, check_compiled, cluttered, load, train
from safetensors.torch import save_file

from dcnv3_tvm import frontend

RATE = 5e-3


def trained_model(steps: int, seed: int, *, deform: bool = True) -> frontend.InternImage:
    """Train the model; without `deform` its offsets keep their initial value, zero."""
    torch.manual_seed(seed)
    model = frontend.create_model("digits_internimage").requires_grad_(True)
    if not deform:
        for module in model.modules():
            if isinstance(module, frontend.DCNv3):
                module.offset.requires_grad_(False)
    digits, _ = load()
    train(model, digits, cluttered, steps=steps, rate=RATE, seed=seed, show=deform)
    return model


def compare(steps: int, first: int, count: int) -> None:
    """Print the accuracy on held-out digits with learned offsets and with offsets of zero."""
    _, held_out = load()
    pairs = []
    for seed in range(first, first + count):
        learned, zero = (
            accuracy(trained_model(steps, seed, deform=deform), held_out, cluttered)
            for deform in (True, False)
        )
        print(f"seed {seed}: learned offsets {learned:.2f} %, zero {zero:.2f} %", flush=True)
        pairs.append((learned, zero, learned - zero))
    columns = zip(*pairs, strict=True)
    for name, values in zip(("learned offsets", "zero", "difference"), columns, strict=True):
        spread = statistics.stdev(values) if count > 1 else 0.0
        print(f"{name}: mean {statistics.mean(values):.2f}, standard deviation {spread:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="batches of 64 (default: 600)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and images, or the first (default: 0)"
    )
    parser.add_argument("--output", type=Path, help="write the weights (.safetensors)")
    parser.add_argument("--compare", action="store_true", help="with and without learned offsets")
    parser.add_argument("--seeds", type=int, default=5, help="how many for --compare (default: 5)")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(arguments.steps, arguments.seed, arguments.seeds)
        return 0

    # Step 1. Train. The gradients of the operator are this library's too.
    model = trained_model(arguments.steps, arguments.seed)

    # Step 2. Round the weights to float16, which halves the file, and save them.
    model.half().float()
    if arguments.output:
        weights = {key: value.half() for key, value in model.state_dict().items()}
        save_file(weights, arguments.output)
        print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")

    # Step 3. Compile, and count the right answers on digits that were not trained with.
    _, held_out = load()
    passed = check_compiled(model, held_out, cluttered)
    print("the compiled models are as accurate" if passed else "a compiled model is LESS accurate")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
