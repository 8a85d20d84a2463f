"""Tune the operator for one shape on this machine, and compile it with the tuning records.

    python examples/tune_operator.py [WORK_DIR]

The work directory keeps every trial: a second run repeats no measurement.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import dcnv3_tvm as dt
from dcnv3_tvm import tuning

SPEC = dt.DCNv3Spec.of((1, 14, 14, 64), group=4)


def main(work_dir: Path) -> None:
    # Step 1. Measure 12 candidate schedules and record the fastest in the work directory.
    summary = tuning.tune([SPEC], work_dir, tuning.TuneConfig(trials=12))
    (kernel,) = summary["kernels"]
    print(f"{SPEC.slug}: {summary['trials']} schedules")
    print(f"  default {1e6 * kernel['default_seconds']:.1f} us")
    print(f"  tuned   {1e6 * kernel['seconds']:.1f} us, with {kernel['decisions']}")

    # Step 2. Compile with the records, and without.
    tuned = dt.compile_op(SPEC, database=work_dir)
    default = dt.compile_op(SPEC, database="none")

    # Step 3. Both compute the same.
    rng = np.random.default_rng(0)
    shapes = (SPEC.input_shape, SPEC.offset_shape, SPEC.mask_shape)
    inputs = [rng.standard_normal(shape, np.float32) for shape in shapes]
    difference = float(np.abs(tuned(*inputs) - default(*inputs)).max())
    print(f"  record: {tuned.kernel.record}; max abs difference {difference:.1e}")


# Candidates are measured in subprocesses, which import this file.
if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
