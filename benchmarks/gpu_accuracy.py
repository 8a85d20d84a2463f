"""Compare the errors of an encoder compiled for a GPU with those of eager PyTorch.

Runs the compiled encoder on the GPU that the tests emulate on the CPU, and PyTorch on the CPU with
all weights and tensors in the same element type. Errors are ||error|| / ||reference|| of each
output, against PyTorch in float64, with random weights and a random image. Exits with 1 if an
output is less accurate than PyTorch's:

    python benchmarks/gpu_accuracy.py --variant internimage_t --dtype bfloat16 [--size 224]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dcnv3_tvm import compile_artifact, frontend, targets
from dcnv3_tvm.verify.compare import difference, pytorch_outputs, reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from emulated_gpu import EmulatedGpu


def compare(
    variant: str, shape: tuple[int, int, int, int], dtype: str, target: str, seed: int
) -> list[tuple[str, float, float]]:
    """Return the errors of each output: its name, this library's, PyTorch's."""
    model = randomize_(frontend.create_model(variant), seed)
    imported = frontend.import_model(model, example=shape)
    image = np.random.default_rng(seed).standard_normal(shape, np.float32)
    reference = reference_outputs(model, image)
    eager = pytorch_outputs(model, image, getattr(torch, dtype))
    arch = str(targets.resolve_gpu(target).attrs["arch"])
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-") as folder, EmulatedGpu(arch) as gpu:
        path = Path(folder) / "encoder"
        with gpu.compiling():
            compile_artifact(imported, path, target=target, dtype=dtype)
        found = gpu.run_model(path, [image])
    return [
        (
            f"{entry}/{tensor.name}",
            difference(tensor.name, output, expected).norm,
            difference(tensor.name, eager_output, expected).norm,
        )
        for entry, outputs in found.items()
        for tensor, output, eager_output, expected in zip(
            imported.entries[entry].outputs,
            outputs,
            eager[entry],
            reference[entry],
            strict=True,
        )
    ]


def main() -> int:
    """Print the errors and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="internimage_t")
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="height [width]")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--target", default="cuda-sm90")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = 1, 3, arguments.size[0], arguments.size[-1]
    rows = compare(arguments.variant, shape, arguments.dtype, arguments.target, arguments.seed)
    print(f"{'output':24} {'dcnv3_tvm':>10} {'PyTorch':>10}")
    for name, ours, eager in rows:
        worse = "" if ours <= eager else "  less accurate"
        print(f"{name:24} {ours:10.2e} {eager:10.2e}{worse}")
    return int(any(not ours <= eager for _, ours, eager in rows))


if __name__ == "__main__":
    sys.exit(main())
