"""Run the DCNv3 operator on NumPy arrays and PyTorch tensors.

    python examples/run_operator.py

Without PyTorch the last step is skipped.
"""

import argparse
import importlib.util
from typing import Any

import numpy as np

import dcnv3_tvm as dt
from dcnv3_tvm.op.reference import dcnv3_reference


def check(call: str, result: Any, expected: np.ndarray) -> None:
    """Compare a result with the float64 reference."""
    error = np.abs(np.asarray(result) - expected).max() / np.abs(expected).max()
    print(f"{call:32} relative error {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("The result is wrong.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=28, help="height and width (default: 28)")
    arguments = parser.parse_args()

    # Step 1. Make inputs. DCNv3Spec computes the shapes: tensors are channels-last, and offset
    # holds an (x, y) pair, mask a weight, for each kernel point of each group.
    spec = dt.DCNv3Spec.of((2, arguments.size, arguments.size, 64), group=4)
    print(f"x {spec.input_shape}, offset {spec.offset_shape}, mask {spec.mask_shape}")
    rng = np.random.default_rng(0)
    x, offset, mask = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (spec.input_shape, spec.offset_shape, spec.mask_shape)
    )
    offset *= 3  # In pixels. Points outside the image read zero.
    expected = dcnv3_reference(x, offset, mask, spec)

    # Step 2. Call the operator. It is compiled for these shapes at the first call.
    check("dt.dcnv3 on NumPy arrays", dt.dcnv3(x, offset, mask, group=4), expected)

    # Step 3. Compile one kernel for all batches and sizes.
    operator = dt.compile_op(dt.DCNv3Spec.of((None, None, None, 64), group=4))
    check("dt.compile_op, dynamic shape", operator(x, offset, mask), expected)

    # Step 4. Errors say what is wrong, what was given, what is allowed, and what to do.
    try:
        dt.dcnv3(x.transpose(0, 3, 1, 2), offset, mask, group=4)
    except dt.DCNv3Error as error:
        print(f"Error for an NCHW array:\n    {error}")

    # Step 5. The same call takes and returns PyTorch tensors.
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: skipped")
        return
    import torch

    tensors = [torch.from_numpy(array) for array in (x, offset, mask)]
    check("dt.dcnv3 on PyTorch tensors", dt.dcnv3(*tensors, group=4), expected)


if __name__ == "__main__":
    main()
