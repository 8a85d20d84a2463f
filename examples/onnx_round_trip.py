"""Export an InternImage to ONNX, run the file in ONNX Runtime, and compile the same file.

python examples/onnx_round_trip.py [--variant internimage_t] [--form deform-conv]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.verify.random_weights import randomize_


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", default="internimage_t", help="a name of `dcnv3-tvm models`")
    parser.add_argument("--form", default="deform-conv", help="deform-conv, grid-sample or custom")
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--output", type=Path, default=Path("model.onnx"), help="file to write")
    arguments = parser.parse_args()

    # Step 1. A model with random weights, which deform; see compile_and_run.py for a checkpoint.
    model = randomize_(frontend.create_model(arguments.variant))
    shape = (1, 3, arguments.size, arguments.size)

    # Step 2. Any runtime that knows the standard operators can run this file.
    frontend.export_onnx(model, arguments.output, example=shape, form=arguments.form)
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    session = onnxruntime.InferenceSession(arguments.output, providers=["CPUExecutionProvider"])
    (reference,) = session.run(None, {"image": image})

    # Step 3. The import turns every DCNv3 back into one operator.
    imported = frontend.import_onnx(arguments.output)
    compiled = dt.compile_model(imported)
    error = np.abs(compiled(image) - reference).max() / np.abs(reference).max()
    print(f"{len(imported.report)} DCNv3 operators; relative difference {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
