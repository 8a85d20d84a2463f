"""An emulated GPU: runs compiled CUDA kernels on the processor, bit for bit as a GPU does.

`install` makes a CUDA toolkit, a driver and a runtime library that need no GPU. A process that
finds them in place of CUDA compiles, loads and runs models as on a machine with GPUs. TVM's runtime
library and its use of memory, streams and graphs are the real ones; kernels are the generated CUDA
source, and the threads of each block run one after the other. `device.h` lists the errors that this
detects: missing barriers, misaligned or out-of-bounds accesses, deadlocks. Times mean nothing.

`EmulatedGpu` runs such a process; the caller's own process stays without a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.environment import CUDA_HOME
from emulated_gpu import nvcc

Array = npt.NDArray[Any]
Output = tuple[tuple[int, ...], str]
"""Shape and dtype."""

Result = TypeVar("Result")

_HERE: Final = Path(__file__).parent
_DRIVER, _RUNTIME = "libcuda.so.1", "libcudart.so.13"
_ARCH, _BACKWARDS = "FAKE_SM", "FAKE_BACKWARDS"
"""Environment variables of the driver: the architecture, and whether threads run in reverse."""


def install(folder: Path) -> dict[str, str]:
    """Make a toolkit, a driver and a runtime library.

    Parameters
    ----------
    folder : Path
        An empty folder for them.

    Returns
    -------
    dict of str to str
        Environment variables to set before a process starts.

    Raises
    ------
    RuntimeError
        If a compiler, ``gcc`` or ``$CC`` and ``g++`` or ``$CXX``, is missing or fails.
    """
    versions, empty = folder / "versions", folder / "empty.c"
    versions.write_text(f"{_RUNTIME} {{ local: *; }};")
    empty.write_text("")
    naming = f"-Wl,--no-as-needed,-soname,{_RUNTIME},--version-script={versions}"
    try:
        build_driver(folder / _DRIVER, _DRIVER)
        _compile([naming, "-o", folder / _RUNTIME, empty, folder / _DRIVER])
        nvcc.prepare(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"cannot build the emulated GPU: {error}") from error
    command = folder / "bin" / "nvcc"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{nvcc.__file__}" "{folder}" "$@"\n')
    command.chmod(0o755)
    return {CUDA_HOME.name: str(folder), "LD_LIBRARY_PATH": str(folder)}


def build_driver(path: Path, name: str) -> None:
    """Build the library of the driver, which a process finds under its name once it is loaded."""
    sources = [_HERE / "driver.c", _HERE / "streams.c"]
    _compile(["-O1", f"-Wl,-soname,{name}", "-o", path, *sources, "-ldl"])


def _compile(arguments: Sequence[str | Path]) -> None:
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class EmulatedGpu:
    """A process with an emulated GPU, as a context manager.

    Parameters
    ----------
    arch : str
        Architecture that the GPU reports, for example ``"sm_90"``.

    Raises
    ------
    RuntimeError
        If a compiler is missing or fails.
    """

    def __init__(self, arch: str = "sm_90") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-emulated-")
        self._environment = install(Path(self._folder.name))
        self._environment[_ARCH] = arch.removeprefix("sm_")
        self._process: ProcessPoolExecutor | None = None

    def __enter__(self) -> EmulatedGpu:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.shutdown()
        self._folder.cleanup()

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this process compiles for the emulated GPU only."""
        return _set({CUDA_HOME.name: self._environment[CUDA_HOME.name]})

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a module-level function in the process with the GPU."""
        if self._process is None:
            self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with _set(self._environment):  # inherited when the process starts
            return self._process.submit(function, *arguments).result()

    def run(
        self, function: Any, target: Any, inputs: Sequence[Array], outputs: Sequence[Output]
    ) -> list[Array]:
        """Compile a scheduled kernel and run it with its threads in both orders.

        Parameters
        ----------
        function : tvm.tirx.PrimFunc
            Scheduled and tensorized kernel.
        target : tvm.target.Target
            Target of the schedule.
        inputs : sequence of numpy.ndarray
            Input arguments.
        outputs : sequence of (shape, dtype)
            Output arguments, initialised with NaN.

        Raises
        ------
        RuntimeError
            If the kernel makes an error that is detected, or the result depends on the order of
            threads.
        """
        return self.run_all({"main": function}, target, {"main": (inputs, outputs)})["main"]

    def run_all(
        self,
        functions: Mapping[str, Any],
        target: Any,
        arguments: Mapping[str, tuple[Sequence[Array], Sequence[Output]]],
        *,
        allowed: float = 0.0,
    ) -> dict[str, list[Array]]:
        """Like `run`, for several kernels compiled together.

        Parameters
        ----------
        functions : mapping of str to tvm.tirx.PrimFunc
            Kernels by name.
        target : tvm.target.Target
            Target of the schedules.
        arguments : mapping of str to (inputs, outputs)
            Arguments of each kernel.
        allowed : float
            Largest difference between the results of both orders, relative to the largest result:
            kernels with atomic additions round in another order.
        """
        cases = {name: (list(inputs), list(made)) for name, (inputs, made) in arguments.items()}
        with self._compiled(_module(functions), target) as library:
            first, second = self.call(_run_kernels, library, cases)
        return {name: _same(first[name], second[name], allowed) for name in first}

    def run_module(self, module: Any, target: Any, inputs: Sequence[Array]) -> list[Array]:
        """Like `run`, for the function ``main`` of a scheduled Relax module.

        Parameters
        ----------
        module : tvm.IRModule
            Relax functions and tensorized kernels.
        target : tvm.target.Target
            Target of the schedules.
        inputs : sequence of numpy.ndarray
            Arguments.
        """
        with self._compiled(module, target) as library:
            return _same(*self.call(_run_main, library, list(inputs)))

    def run_model(self, path: Path, inputs: Sequence[Array]) -> dict[str, list[Array]]:
        """Run every entry of an artifact with threads in both orders, the second as a graph replay.

        Parameters
        ----------
        path : Path
            Artifact compiled within `compiling`.
        inputs : sequence of numpy.ndarray
            Inputs of every entry.

        Returns
        -------
        dict of str to list of numpy.ndarray
            The outputs of each entry.

        Raises
        ------
        RuntimeError
            As in `run`.
        """
        first, second = self.call(_run_model, path, list(inputs))
        return {name: _same(first[name], second[name]) for name in first}

    @contextlib.contextmanager
    def _compiled(self, module: Any, target: Any) -> Iterator[Path]:
        """Compile a module to a temporary library."""
        from dcnv3_tvm.compiler.cuda.export import export_module

        with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-kernels-") as folder:
            library = Path(folder) / "kernels.so"
            with self.compiling():
                export_module(module, target, library)
            yield library


def _module(functions: Mapping[str, Any]) -> Any:
    import tvm

    return tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )


def _same(forwards: list[Array], backwards: list[Array], allowed: float = 0.0) -> list[Array]:
    for one, other in zip(forwards, backwards, strict=True):
        if one.tobytes() == other.tobytes():
            continue
        difference = np.abs(one.astype("float64") - other.astype("float64"))
        if not allowed or not np.all(difference <= allowed * np.abs(one).max(initial=0)):
            raise RuntimeError("the result depends on the order of threads")
    return forwards


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# The following functions run in the process with the GPU.


def _in_both_orders(function: Callable[[], Result]) -> tuple[Result, Result]:
    found = []
    for backwards in ("0", "1"):
        with _set({_BACKWARDS: backwards}):
            found.append(function())
    return found[0], found[1]


def _open(library: Path) -> tuple[Any, Any]:
    """Load a library; return it and the device."""
    import tvm

    from dcnv3_tvm.runtime import cuda

    cuda.load_runtime()
    return tvm.runtime.load_module(str(library)), tvm.cuda(0)


def _run_kernels(
    library: Path, cases: dict[str, tuple[list[Array], list[Output]]]
) -> tuple[dict[str, list[Array]], dict[str, list[Array]]]:
    import tvm

    module, gpu = _open(library)

    def once() -> dict[str, list[Array]]:
        found = {}
        for name, (inputs, outputs) in cases.items():
            given = [tvm.runtime.tensor(array, gpu) for array in inputs]
            made = [tvm.runtime.empty(shape, dtype, gpu) for shape, dtype in outputs]
            module[name](*given, *made)
            found[name] = [tensor.numpy() for tensor in made]
        return found

    return _in_both_orders(once)


def _run_main(library: Path, inputs: list[Array]) -> tuple[list[Array], list[Array]]:
    import tvm
    from tvm import relax

    from dcnv3_tvm.runtime.model import flatten

    module, gpu = _open(library)
    machine = relax.VirtualMachine(module, gpu)

    def once() -> list[Array]:
        result = machine["main"](*(tvm.runtime.tensor(array, gpu) for array in inputs))
        return [tensor.numpy() for tensor in flatten(result)]

    return _in_both_orders(once)


def _run_model(
    path: Path, inputs: list[Array]
) -> tuple[dict[str, list[Array]], dict[str, list[Array]]]:
    from dcnv3_tvm import runtime
    from dcnv3_tvm.verify.entries import entry_outputs

    with runtime.load(path) as model:
        return _in_both_orders(lambda: entry_outputs(model, *inputs))
