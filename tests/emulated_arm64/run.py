"""Run the kernels and the encoder of a folder; QEMU runs this with AArch64's Python."""

import json
import sys
from pathlib import Path

import numpy as np

from dcnv3_tvm import runtime
from dcnv3_tvm.runtime.kernel import KernelLibrary
from helpers.guarded import GuardedOutput, surrounded

folder = Path(sys.argv[1])
with runtime.load(folder / "encoder") as model:
    image = np.load(folder / "image.npy")
    np.savez(folder / "outputs.npz", model(image), *model.features(image))
kernels = KernelLibrary((folder / "kernels.so").read_bytes(), on_gpu=False)
for name, shape in json.loads((folder / "shapes.json").read_text()).items():
    inputs = np.load(folder / f"{name}.npz")
    output = GuardedOutput(shape, "float32")
    kernels[name](*(surrounded(inputs[key]) for key in inputs.files), output.argument)
    np.save(folder / f"{name}.out.npy", output.checked())
