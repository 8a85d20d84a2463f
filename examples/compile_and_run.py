"""The whole way: a PyTorch InternImage becomes a folder that runs without PyTorch.

    python examples/compile_and_run.py [--variant internimage_t] [--checkpoint FILE] [--image FILE]

Builds the model, imports it into Relax, compiles it for this machine, saves and loads the folder,
runs it on a photograph, compares every output with PyTorch in float64, and measures both. Without
--checkpoint the weights are random: the numbers are real, the predicted classes mean nothing.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# PyTorch's idle threads spin on the cores that compiled models compute on, unless told before
# PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.runtime import top_k
from dcnv3_tvm.verify import tolerances
from dcnv3_tvm.verify.compare import compare
from dcnv3_tvm.verify.random_weights import randomize_

TOLERANCE = tolerances.MODEL["float32"]

WARM_UP_CALLS = 3


def sample_photograph() -> Path:
    """Find the photograph of a temple that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    return Path(load_sample_images().filenames[0])


def build_model(variant: str, checkpoint: Path | None) -> frontend.InternImage:
    """Build the PyTorch model; without a checkpoint, with random weights that do deform."""
    model = frontend.create_model(variant, checkpoint=checkpoint)
    return model if checkpoint is not None else randomize_(model, seed=0)


@contextlib.contextmanager
def step(name: str, seconds: dict[str, float]) -> Iterator[Progress]:
    """Show a step on stderr while it runs, and keep its time."""
    with Progress(name) as progress:
        progress.step("...")
        yield progress
        seconds[name] = progress.seconds


def milliseconds(call: Callable[[], Any], calls: int) -> tuple[float, float, float]:
    """Measure a call and return the quartiles, the median in the middle."""
    # A pause lets the threads of whoever computed before go to sleep.
    time.sleep(0.5)
    times = []
    for _ in range(WARM_UP_CALLS + calls):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    lower, median, upper = statistics.quantiles(times[WARM_UP_CALLS:], n=4, method="inclusive")
    return lower, median, upper


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", default="internimage_t", help="a name of `dcnv3-tvm models`")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: random)")
    parser.add_argument("--image", type=Path, help="photograph (default: scikit-learn's china.jpg)")
    parser.add_argument("--output", type=Path, help="folder (default: build/<variant>)")
    parser.add_argument("--calls", type=int, default=15, help="measured calls (default: 15)")
    arguments = parser.parse_args()
    output = arguments.output or Path("build") / arguments.variant
    photograph = arguments.image or sample_photograph()
    resolution = model_config(arguments.variant).resolution
    steps: dict[str, float] = {}

    with step("build the PyTorch model", steps):
        model = build_model(arguments.variant, arguments.checkpoint)
    with step("import it into Relax", steps):
        imported = frontend.import_model(model, example=(1, 3, resolution, resolution))
    with step("compile it", steps) as progress:
        compiled = dt.compile_model(imported, on_phase=progress.step)
    with step("save the folder", steps):
        compiled.save(output)
    with step("load the folder", steps):
        encoder = dt.load(output)
    with step("run it on the photograph", steps):
        image = encoder.preprocess(photograph)
        logits = encoder(image)
        maps = encoder.features(image)
    with step("compare it with PyTorch", steps):
        differences = compare(encoder, model, image)
    with step("measure both", steps) as progress:
        torch.set_num_threads(encoder.threads)
        tensor = torch.from_numpy(image)
        progress.step("PyTorch")
        with torch.inference_mode():
            eager = milliseconds(lambda: model(tensor), arguments.calls)
        progress.step("compiled")
        ours = milliseconds(lambda: encoder(image), arguments.calls)

    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    print(f"\n{output}: {arguments.variant} for {encoder.metadata.target.slug}, {size:.1f} MB")
    for name, seconds in steps.items():
        print(f"  {seconds:7.1f} s  {name}")

    print(f"\n{photograph.name}, resized and cropped to {resolution} x {resolution}")
    classes, probabilities = top_k(logits, k=3)
    likeliest = [
        f"{number} ({probability:.2f})"
        for number, probability in zip(classes[0], probabilities[0], strict=True)
    ]
    print(f"  likeliest classes: {', '.join(likeliest)}")
    if arguments.checkpoint is None:
        print("  (the weights are random, so the classes mean nothing; see --checkpoint)")
    for number, values in enumerate(maps):
        print(f"  feature map {number}: {values.shape}, mean {np.mean(values):+.3f}")

    print("\nLargest difference to PyTorch in float64, relative to the largest value of the output")
    for found in differences:
        print(f"  {found.output:24} {found.maximum:.1e}  (largest value {found.scale:.3g})")
    passed = all(found.within("float32") for found in differences)
    print(f"  {'all within' if passed else 'NOT ALL within'} {TOLERANCE:g}")

    print(f"\nMilliseconds a call, batch 1, {encoder.threads} threads: median (quartiles)")
    for name, (lower, median, upper) in (
        ("compiled", ours),
        ("PyTorch, eager, with this library's DCNv3 operator", eager),
    ):
        print(f"  {median:8.1f} ({lower:.1f} to {upper:.1f})  {name}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
