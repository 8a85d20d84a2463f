"""Train one model twice, with this library's operator and with the published sampling in PyTorch.

Both start from the same weights and see the same digits, so that the losses differ by rounding
only, which training amplifies. Prints both, and their relative difference:

    python benchmarks/loss_curves.py [--steps 200] [--dtype float32] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.verify.pytorch_reference import with_sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import cluttered, load, train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="batches of 64 (default: 200)")
    parser.add_argument("--dtype", default="float32", help="float32 or float64")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    torch.manual_seed(arguments.seed)
    ours = frontend.create_model("digits_internimage").requires_grad_(True).to(dtype)
    published = with_sampling(ours)
    digits, _ = load()
    curves = [
        train(
            model,
            digits,
            lambda images, generator: cluttered(images, generator).to(dtype),
            steps=arguments.steps,
            rate=5e-3,
            seed=arguments.seed,
            show=False,
        )
        for model in (ours, published)
    ]
    print(" step      ours published  difference")
    for step, (loss, expected) in enumerate(zip(*curves, strict=True), start=1):
        print(f"{step:5} {loss:9.6f} {expected:9.6f} {abs(loss - expected) / expected:11.1e}")
    last = min(50, arguments.steps)
    means = [sum(curve[-last:]) / last for curve in curves]
    print(f"mean of the last {last}: {means[0]:.4f} and {means[1]:.4f}")


if __name__ == "__main__":
    main()
