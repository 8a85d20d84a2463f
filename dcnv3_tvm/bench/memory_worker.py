"""Run one backend in a fresh process, with only the imports that its users need.

``python -m dcnv3_tvm.bench.memory_worker`` reads a `MemoryTask` as JSON from standard input and
prints the result as JSON on the last line.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.bench import runners
from dcnv3_tvm.bench.backends import COMPILE, OURS, UNTUNED
from dcnv3_tvm.errors import DCNv3Error

_STATUS: Final = Path("/proc/self/status")


class WorkerError(DCNv3Error):
    """The process of a backend failed."""


@dataclasses.dataclass(frozen=True)
class MemoryTask:
    """A model to run.

    Parameters
    ----------
    backend : str
        `OURS` or the name of a peer.
    model : str
        Path of the artifact, pickled PyTorch module or ONNX file.
    inputs, outputs : str
        Paths of ``.npz`` files: inputs by name; outputs to write, if not empty.
    threads : int
        Threads that compute.
    calls : int
        Number of calls.
    training : str, optional
        Train the pickled PyTorch module, in this dtype.
    """

    backend: str
    model: str
    inputs: str
    outputs: str
    threads: int
    calls: int
    training: str | None = None


def run_worker(task: MemoryTask) -> dict[str, Any]:
    """Run a task in a fresh process.

    Returns
    -------
    dict
        ``"bytes"``, the peak resident memory, and ``"imported"``, which of ``torch`` and ``tvm``
        the process imported.

    Raises
    ------
    WorkerError
        If the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dcnv3_tvm.bench.memory_worker"],
        input=json.dumps(dataclasses.asdict(task)),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise WorkerError(
            f"the process of {task.backend} failed",
            got=lines[-1] if lines else f"exit code {done.returncode}",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _runner(task: MemoryTask, inputs: Mapping[str, Any]) -> runners.BackendRunner:
    """Open the model as its users do."""
    path = Path(task.model)
    if task.backend in (OURS, UNTUNED):
        import dcnv3_tvm

        return runners.compiled_model_runner(dcnv3_tvm.load(path), inputs, task.threads)
    if path.suffix == ".onnx":
        return runners.onnx_runner(task.backend, path, inputs, task.threads)
    import torch

    module = torch.load(path, weights_only=False)
    if task.training is not None:
        return runners.training_runner(module, inputs, task.threads, task.training)
    if task.backend == COMPILE:
        module = torch.compile(module)
    return runners.torch_runner(module, inputs, task.threads)


def _peak_memory() -> int:
    """Return this process's peak resident memory; `getrusage` may return the parent's."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])
    raise WorkerError(f"{_STATUS} has no VmHWM", hint="This benchmark needs Linux.")


def main() -> None:
    """Run the task given on standard input."""
    task = MemoryTask(**json.load(sys.stdin))
    with np.load(task.inputs) as file:
        runner = _runner(task, dict(file))
    for _ in range(task.calls):
        result = runner.call()
    peak = _peak_memory()
    if task.outputs:
        np.savez(task.outputs, *runner.outputs(result))
    imported = [name for name in ("torch", "tvm") if name in sys.modules]
    print("\n" + json.dumps({"bytes": peak, "imported": imported}))


if __name__ == "__main__":
    main()
