"""One contestant in a fresh process, which imports what this contestant's users import.

``python -m dcnv3_tvm.bench.alone`` reads a task as JSON from its standard input, does it, and
writes the answer as JSON on the last line of its output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.bench import sessions
from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.errors import DCNv3Error

_STATUS: Final = Path("/proc/self/status")
_WATCHED: Final = ("torch", "tvm")


class AloneError(DCNv3Error):
    """A process in which something was to be measured alone has failed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process does.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    contestant : str
        Whose model it runs.
    model : str
        Path of what that one opens: an artifact, a pickled PyTorch module, an ONNX file.
    inputs, outputs : str
        Paths of ``.npz`` files: the inputs by name, and where the outputs go.
    threads : int
        To compute with.
    settings : dict
        What else the task wants to know.
    """

    name: str
    contestant: str
    model: str
    inputs: str
    outputs: str
    threads: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_alone(task: Task, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Do a task in a fresh process and return its answer.

    Parameters
    ----------
    task : Task
        What to do.
    environment : dict of str to str, optional
        Variables of the process, besides those of this one; an empty value takes one away.

    Raises
    ------
    AloneError
        If the process fails.
    """
    variables = os.environ | dict(environment or {})
    done = subprocess.run(
        [sys.executable, "-m", "dcnv3_tvm.bench.alone"],
        input=json.dumps(dataclasses.asdict(task)),
        capture_output=True,
        text=True,
        env={name: value for name, value in variables.items() if value},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise AloneError(
            f"{task.contestant} failed in a process of its own",
            got=lines[-1] if lines else f"exit code {done.returncode}",
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _session(task: Task, inputs: Mapping[str, Any]) -> sessions.Session:
    """Open the model as its users do."""
    path = Path(task.model)
    if task.contestant == OURS:
        import dcnv3_tvm

        return sessions.of_ours(dcnv3_tvm.load(path), inputs, task.threads)
    if task.contestant.startswith("onnxruntime"):
        return sessions.of_onnxruntime(path, inputs, task.threads)
    if task.contestant.startswith("openvino"):
        precision = "bf16" if task.contestant.endswith("bf16") else "f32"
        return sessions.of_openvino(path, inputs, task.threads, precision)
    import torch

    module = torch.load(path, weights_only=False)
    if task.contestant == "compile":
        module = torch.compile(module)
    return sessions.of_torch(module, inputs, task.threads)


def _inputs(task: Task) -> dict[str, Any]:
    with np.load(task.inputs) as file:
        return dict(file)


def peak_memory(task: Task) -> dict[str, Any]:
    """Call a model some times, and say how much memory the process had at most.

    Returns
    -------
    dict
        ``"bytes"``, and ``"imported"``: which of PyTorch and TVM's compiler the process holds.
    """
    session = _session(task, _inputs(task))
    for _ in range(task.settings["calls"]):
        result = session.call()
    peak = _peak()
    np.savez(task.outputs, *session.outputs(result))
    return {"bytes": peak, "imported": [name for name in _WATCHED if name in sys.modules]}


def _peak() -> int:
    """Return the peak resident memory of this program; `getrusage` includes its parent's."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])
    raise AloneError(f"{_STATUS} does not tell the peak memory", hint="This needs Linux.")


TASKS: Final[dict[str, Callable[[Task], dict[str, Any]]]] = {
    "peak_memory": peak_memory,
}
"""What a process can be asked for, by name."""


def main() -> None:
    """Do the task that stands on the standard input."""
    task = Task(**json.load(sys.stdin))
    print("\n" + json.dumps(TASKS[task.name](task)))


if __name__ == "__main__":
    main()
