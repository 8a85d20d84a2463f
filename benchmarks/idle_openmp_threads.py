"""Measure how much PyTorch's idle OpenMP threads slow down a compiled model in the same process.

After an operation, PyTorch's worker threads spin for some time before they sleep, and compete for
the cores with the model that runs next. Every setting of environment variables is measured in a
process of its own:

    python benchmarks/idle_openmp_threads.py [--variant internimage_t] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"GOMP_SPINCOUNT": "10000"},
    {"GOMP_SPINCOUNT": "0"},
    {"OMP_WAIT_POLICY": "PASSIVE"},
    {"TVM_BIND_THREADS": "0"},
)
MATRIX_SIZE = 512


def measure_setting(artifact: str, threads: int) -> dict[str, float]:
    """Time model calls alone and after a PyTorch matmul, which itself is not timed; in seconds."""
    import torch

    import dcnv3_tvm
    from dcnv3_tvm.bench.measure import Plan, measure

    torch.set_num_threads(threads)
    model = dcnv3_tvm.load(artifact)
    model.threads = threads
    shape = model.metadata.entries["main"].inputs[0].shape
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    model(image)
    timings = measure(
        {"alone": lambda: model(image), "after PyTorch": lambda: model(image)},
        Plan(),
        before={"after PyTorch": lambda: matrix @ matrix},
    )
    speed = timings["alone"].ratio_to(timings["after PyTorch"])
    seconds = {name: timing.seconds.median for name, timing in timings.items()}
    return {**seconds, "relative speed": speed.median}


def main() -> None:
    """Compile the model and measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="internimage_t")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--artifact", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.artifact:
        print(json.dumps(measure_setting(arguments.artifact, arguments.threads)))
        return

    from dcnv3_tvm import compile_artifact, frontend
    from dcnv3_tvm.bench.cases import encoder_case
    from dcnv3_tvm.provenance import Provenance

    variables = {name for setting in SETTINGS for name in setting}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-") as folder:
        case = encoder_case(arguments.variant)
        model = frontend.create_model(case.variant)
        imported = frontend.import_model(model, example=(1, 3, *case.size))
        compile_artifact(imported, Path(folder) / "model")
        command = [sys.executable, __file__, "--artifact", f"{folder}/model"]
        command += ["--threads", str(arguments.threads)]
        inherited = {name: value for name, value in os.environ.items() if name not in variables}
        for setting in SETTINGS:
            done = subprocess.run(
                command, env=inherited | setting, check=True, stdout=subprocess.PIPE, text=True
            )
            name = " ".join(f"{key}={value}" for key, value in setting.items()) or "defaults"
            rows.append({"setting": name} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    if arguments.json is not None:
        provenance = Provenance.here(arguments.threads).to_json()
        report = {"kind": "idle-openmp-threads", "provenance": provenance, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
