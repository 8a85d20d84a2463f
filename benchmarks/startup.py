"""Measure how long runtimes take from the start of a process to the first result, and their sizes.

Each starts in turn, with the imports that it needs, opens InternImage-T and computes one image;
what it reads is in the page cache. Outputs are compared with PyTorch in float64 first. The C++
program is that of examples/cpp, if it is named:

    python benchmarks/startup.py [--rounds 10] [--cpp build/cpp/run_artifact] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement

from dcnv3_tvm import compile_artifact, frontend
from dcnv3_tvm.bench.accuracy import largest_error
from dcnv3_tvm.bench.cases import encoder_case
from dcnv3_tvm.bench.measure import Quartiles
from dcnv3_tvm.bench.problems import Problem, encoder_problem
from dcnv3_tvm.bundle.modules import runtime_modules
from dcnv3_tvm.machine import physical_cores
from dcnv3_tvm.provenance import Provenance

PAUSE = 0.3
"""Seconds before a process starts."""

OURS = """
import sys
import numpy as np
from dcnv3_tvm import runtime

path, image, output, threads = sys.argv[1:]
model = runtime.load(path, threads=int(threads), verify_digests={verify})
np.save(output, model(np.load(image)))
print("done", flush=True)
"""
ONNXRUNTIME = """
import sys
import numpy as np
import onnxruntime

path, image, output, threads = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
(name,) = (given.name for given in session.get_inputs())
np.save(output, session.run(None, {name: np.load(image)})[0])
print("done", flush=True)
"""
PYTORCH = """
import sys
import numpy as np
import torch

path, image, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = torch.load(path, weights_only=False)
with torch.inference_mode():
    np.save(output, model(torch.from_numpy(np.load(image))).numpy())
print("done", flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run the model.

    Parameters
    ----------
    command : list of str
        Program that prints a line after it has written its output.
    output : Path
        What it writes.
    packages : int
        Bytes of the installed packages, or of program and libraries.
    model : int
        Bytes of the files of the model.
    """

    command: list[str]
    output: Path
    packages: int
    model: int

    def run(self) -> tuple[float, float]:
        """Start the program; return the time until it prints a line, and its processor time."""
        time.sleep(PAUSE)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        with subprocess.Popen(self.command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            elapsed = time.perf_counter() - start
            process.stdout.read()
        if process.returncode != 0 or not line:
            raise RuntimeError(f"{self.command[0]} failed with exit code {process.returncode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def result(self) -> np.ndarray:
        """Return what it wrote."""
        if self.output.suffix == ".npy":
            array: np.ndarray = np.load(self.output)
            return array
        return np.fromfile(self.output, np.float32)[None]


def backends(problem: Problem, folder: Path, threads: int, cpp: Path | None) -> dict[str, Backend]:
    """Write the files of the model, and return the ways to run it."""
    image, artifact, module = folder / "image.npy", folder / "artifact", folder / "module.pt"
    np.save(image, problem.inputs["image"])
    source: Any = problem.source
    shape = tuple(problem.inputs["image"].shape)
    compile_artifact(frontend.import_model(source, example=shape), artifact)
    torch.save(problem.module, module)

    def python(code: str, model: Path, name: str, packages: int, size: int) -> Backend:
        output = folder / f"{name}.npy"
        arguments = [str(model), str(image), str(output), str(threads)]
        return Backend([sys.executable, "-c", code, *arguments], output, packages, size)

    own = installed("apache-tvm-ffi", "numpy") + sum(
        path.stat().st_size for path in runtime_modules().values()
    )
    found = {
        "dcnv3-tvm": python(OURS.format(verify=True), artifact, "ours", own, size(artifact)),
        "dcnv3-tvm, no digests": python(
            OURS.format(verify=False), artifact, "unverified", own, size(artifact)
        ),
    }
    if cpp is not None:
        problem.inputs["image"].tofile(folder / "image.f32")
        (library,) = (
            Path(str(file.locate()))
            for file in importlib.metadata.files("apache-tvm-ffi") or []
            if file.name == "libtvm_ffi.so"
        )
        program = cpp.stat().st_size + library.stat().st_size
        for name, options in {"dcnv3-tvm, C++": [], "no digests": ["--trust-weights"]}.items():
            output = folder / f"cpp{len(options)}.f32"
            command = [str(cpp.resolve()), str(artifact), str(folder / "image.f32"), *options]
            command += ["--output", str(output), "--threads", str(threads)]
            label = name if not options else f"dcnv3-tvm, C++, {name}"
            found[label] = Backend(command, output, program, size(artifact))
    onnx = problem.onnx_deform.path
    found["ONNX Runtime"] = python(
        ONNXRUNTIME, onnx, "onnxruntime", installed("onnxruntime"), size(onnx.parent)
    )
    found["PyTorch"] = python(
        PYTORCH, module, "torch", installed("torch", "numpy"), module.stat().st_size
    )
    return found


def installed(*packages: str) -> int:
    """Return the bytes of installed packages and of all that they require."""
    names, queue = set(), set(packages)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name not in names:
            names.add(name)
            required = map(Requirement, importlib.metadata.requires(name) or [])
            queue |= {
                one.name for one in required if not one.marker or one.marker.evaluate({"extra": ""})
            }
    files = (file for name in names for file in importlib.metadata.files(name) or [])
    paths = {Path(str(file.locate())) for file in files if file.suffix != ".pyc"}
    return sum(path.stat().st_size for path in paths if path.is_file())


def size(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(found: dict[str, Backend], problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Compare outputs, then start the backends in turn; print and return the results."""
    errors = {}
    for name, backend in found.items():
        backend.run()  # Also fills the page cache.
        errors[name] = largest_error([backend.result()], problem.reference, problem.measure)
        if not errors[name] <= problem.tolerance:
            raise SystemExit(f"{name} is wrong: error {errors[name]:.1e}")
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    order = list(found)
    for _ in range(rounds):
        for name in order:
            runs[name].append(found[name].run())
        order = order[1:] + order[:1]
    rows = []
    for name, backend in found.items():
        seconds, cpu_seconds = (Quartiles.of(values) for values in zip(*runs[name], strict=True))
        packages, model = backend.packages / 1e6, backend.model / 1e6
        print(
            f"{name:26} {seconds.median:6.2f} s ({seconds.lower:.2f} to {seconds.upper:.2f}), "
            f"processor {cpu_seconds.median:5.2f} s, "
            f"packages {packages:6.1f} MB, model {model:6.1f} MB, error {errors[name]:.1e}"
        )
        rows.append(
            {"backend": name, "seconds": dataclasses.asdict(seconds)}
            | {"cpu_seconds": dataclasses.asdict(cpu_seconds), "error": errors[name]}
            | {"bytes_of_packages": backend.packages, "bytes_of_model": backend.model}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files, measure, and write the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--variant", default="internimage_t")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--cpp", type=Path, metavar="PROGRAM", help="built from examples/cpp")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    case = encoder_case(arguments.variant)
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-") as name:
        problem = encoder_problem(case)
        found = backends(problem, Path(name), arguments.threads, arguments.cpp)
        provenance = Provenance.here(arguments.threads)
        rows = measure(found, problem, arguments.rounds)
    if arguments.json is not None:
        report = {"kind": "startup", "slug": case.slug, "provenance": provenance.to_json()}
        arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
