"""A GPU emulated by the processor: what runs on a GPU, byte for byte the same, without one.

`install` makes a CUDA toolkit, a driver and a runtime library that need no GPU. A process that finds
them where it looks for CUDA compiles, loads and runs models as on a machine with GPUs. TVM's runtime
library, memory, streams and graphs are the real ones; kernels are the generated CUDA source, the
threads of each block run one by one. `device.h` says what is seen by that: missing barriers,
misaligned or stray accesses, threads that wait for each other. Of speed it says nothing.

`EmulatedGpu` is such a process: the caller's own stays without a GPU.
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
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.environment import CUDA_HOME

Array = npt.NDArray[Any]
Result = TypeVar("Result")

_HERE: Final = Path(__file__).parent
_DRIVER, _RUNTIME = "libcuda.so.1", "libcudart.so.13"
_ARCH, _BACKWARDS = "FAKE_SM", "FAKE_BACKWARDS"
"""What the driver reads from the environment: the architecture, and the order of threads."""


def install(folder: Path) -> dict[str, str]:
    """Make a toolkit, a driver and a runtime library.

    Parameters
    ----------
    folder : Path
        An empty folder for them.

    Returns
    -------
    dict of str to str
        Environment variables, to be set before a process starts.

    Raises
    ------
    RuntimeError
        If the C compiler, ``gcc`` or ``$CC``, is missing or fails.
    """
    versions, empty = folder / "versions", folder / "empty.c"
    versions.write_text(f"{_RUNTIME} {{ local: *; }};")
    empty.write_text("")
    common = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w"]
    naming = f"-Wl,--no-as-needed,-soname,{_RUNTIME},--version-script={versions}"
    driver = folder / _DRIVER
    for command in (
        [*common, "-O1", f"-Wl,-soname,{_DRIVER}", "-o", driver, _HERE / "driver.c", "-ldl"],
        [*common, naming, "-o", folder / _RUNTIME, empty, driver],
    ):
        try:
            subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"the emulated GPU cannot be made: {error}") from error
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{_HERE / "nvcc.py"}" "$@"\n')
    nvcc.chmod(0o755)
    return {CUDA_HOME.name: str(folder), "LD_LIBRARY_PATH": str(folder)}


class EmulatedGpu:
    """A process with an emulated GPU; a context manager, which ends it.

    Parameters
    ----------
    arch : str
        The architecture that the GPU says it has, for example ``"sm_90"``.

    Raises
    ------
    RuntimeError
        If the C compiler is missing or fails.
    """

    def __init__(self, arch: str = "sm_90") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-emulated-")
        self._environment = install(Path(self._folder.name))
        self._environment[_ARCH] = arch.removeprefix("sm_")
        self._process: ProcessPoolExecutor | None = None

    def __enter__(self) -> EmulatedGpu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.shutdown()
        self._folder.cleanup()

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """While entered, what this process compiles for GPUs runs on the emulated one alone."""
        return _set({CUDA_HOME.name: self._environment[CUDA_HOME.name]})

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of a module in the process that has the GPU."""
        if self._process is None:
            self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with _set(self._environment):  # which the process takes over when it starts
            return self._process.submit(function, *arguments).result()

    def run(
        self,
        function: Any,
        target: Any,
        inputs: Sequence[Array],
        outputs: Sequence[tuple[tuple[int, ...], str]],
    ) -> list[Array]:
        """Compile a scheduled kernel and run it, with its threads in both orders.

        Parameters
        ----------
        function : tvm.tirx.PrimFunc
            Scheduled, intrinsics in place.
        target : tvm.target.Target
            What it is scheduled for.
        inputs : sequence of numpy.ndarray
            Its first arguments.
        outputs : sequence of (shape, dtype)
            Its other arguments, which begin as NaN.

        Raises
        ------
        RuntimeError
            If the kernel does what a GPU would not do, or the two results are not the same.
        """
        from dcnv3_tvm.compiler.kernels import export_kernel

        with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-kernel-") as folder:
            library = Path(folder) / "kernel.so"
            with self.compiling():
                export_kernel(function, target, library)
            return _same(*self.call(_run_kernel, library, list(inputs), list(outputs)))

    def run_model(self, path: Path, inputs: Sequence[Array]) -> dict[str, list[Array]]:
        """Run every entry of an artifact twice, threads in both orders, graphs replayed.

        Parameters
        ----------
        path : Path
            The artifact, made under `compiling`.
        inputs : sequence of numpy.ndarray
            Of every entry.

        Returns
        -------
        dict of str to list of numpy.ndarray
            The outputs of each entry.

        Raises
        ------
        RuntimeError
            As for `run`.
        """
        first, second = self.call(_run_model, path, list(inputs))
        return {name: _same(first[name], second[name]) for name in first}


def _same(forwards: list[Array], backwards: list[Array]) -> list[Array]:
    for one, other in zip(forwards, backwards, strict=True):
        if one.tobytes() != other.tobytes():
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


def _run_kernel(
    library: Path, inputs: list[Array], outputs: list[tuple[tuple[int, ...], str]]
) -> tuple[list[Array], list[Array]]:
    import tvm

    from dcnv3_tvm.compiler.kernels import ENTRY
    from dcnv3_tvm.runtime import cuda

    cuda.load_runtime()
    kernel = tvm.runtime.load_module(str(library))[ENTRY]
    device = tvm.cuda(0)

    def once(backwards: str) -> list[Array]:
        with _set({_BACKWARDS: backwards}):
            given = [tvm.runtime.tensor(array, device) for array in inputs]
            made = [tvm.runtime.empty(shape, dtype, device) for shape, dtype in outputs]
            kernel(*given, *made)
            return [tensor.numpy() for tensor in made]

    return once("0"), once("1")


def _run_model(path: Path, inputs: list[Array]) -> tuple[dict[str, list[Array]], ...]:
    from dcnv3_tvm import runtime
    from dcnv3_tvm.testing.entries import entry_outputs

    def once(model: Any, backwards: str) -> dict[str, list[Array]]:
        with _set({_BACKWARDS: backwards}):
            return entry_outputs(model, *inputs)

    with runtime.load(path) as model:
        return once(model, "0"), once(model, "1")
