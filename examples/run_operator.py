"""The operator by itself, on arrays of NumPy and tensors of PyTorch.

    python examples/run_operator.py

Without PyTorch the second half is left out.
"""

import argparse
import importlib.util
from typing import Any

import numpy as np

import dcnv3_tvm as dt
from dcnv3_tvm.op.reference import dcnv3_reference

TOLERANCE = 1e-5


def check(what: str, result: Any, expected: np.ndarray) -> None:
    """Compare a result with the float64 reference."""
    error = np.abs(np.asarray(result) - expected).max() / np.abs(expected).max()
    print(f"{what:32} largest relative error {error:.1e}")
    if not error < TOLERANCE:
        raise SystemExit("The result is wrong.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=28, help="height and width (default: 28)")
    arguments = parser.parse_args()

    # The specification knows the shapes: channels-last, offsets as (x, y) pairs for each point.
    spec = dt.DCNv3Spec.of((2, arguments.size, arguments.size, 64), group=4)
    print(f"{spec.slug}: x {spec.input_shape}, offset {spec.offset_shape}, mask {spec.mask_shape}")
    rng = np.random.default_rng(0)
    x, offset, mask = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (spec.input_shape, spec.offset_shape, spec.mask_shape)
    )
    offset *= 3  # pixels; some points fall outside the image and read zero
    expected = dcnv3_reference(x, offset, mask, spec)

    check("dt.dcnv3 on NumPy arrays", dt.dcnv3(x, offset, mask, group=4), expected)

    # One kernel for every batch and size, kept in the caller's hands.
    operator = dt.compile_op(dt.DCNv3Spec.of((None, None, None, 64), group=4))
    check("dt.compile_op for any size", operator(x, offset, mask), expected)

    try:
        dt.dcnv3(x.transpose(0, 3, 1, 2), offset, mask, group=4)
    except dt.DCNv3Error as error:
        print(f"an NCHW tensor is refused:\n    {error}")

    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: its half is left out")
        return
    import torch

    tensors = [torch.from_numpy(array) for array in (x, offset, mask)]
    check("dt.dcnv3 on PyTorch tensors", dt.dcnv3(*tensors, group=4), expected)


if __name__ == "__main__":
    main()
