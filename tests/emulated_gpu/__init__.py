"""A GPU emulated by the processor: what runs on a GPU, byte for byte the same, without one.

`install` makes a CUDA toolkit, a driver and a runtime library that need no GPU. A process that
finds them where it looks for CUDA compiles, loads and runs models as on a machine with GPUs. TVM's
runtime library and its use of memory, streams and graphs are the real ones; kernels are the
generated CUDA source, the threads of each block run one by one. `device.h` says what is seen by
that: missing barriers, misaligned or stray accesses, threads that wait for each other. It has no
speed, but can count what kernels move through memory: `EmulatedGpu.traffic`.

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
from typing import Any, Final, TypeVar

import numpy.typing as npt

from dcnv3_tvm.environment import CUDA_HOME

Array = npt.NDArray[Any]
Output = tuple[tuple[int, ...], str]
"""Shape and element type."""

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
    commands = (
        [*common, "-O1", f"-Wl,-soname,{_DRIVER}", "-o", driver, _HERE / "driver.c", "-ldl"],
        [*common, naming, "-o", folder / _RUNTIME, empty, driver],
    )
    try:
        for command in commands:
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

    def __exit__(self, *_: object) -> None:
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
        self, function: Any, target: Any, inputs: Sequence[Array], outputs: Sequence[Output]
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
        return self.run_all({"main": function}, target, {"main": (inputs, outputs)})["main"]

    def run_all(
        self,
        functions: Mapping[str, Any],
        target: Any,
        arguments: Mapping[str, tuple[Sequence[Array], Sequence[Output]]],
    ) -> dict[str, list[Array]]:
        """Do as `run` does for several kernels, compiled together.

        Parameters
        ----------
        functions : mapping of str to tvm.tirx.PrimFunc
            By name.
        target : tvm.target.Target
            What they are scheduled for.
        arguments : mapping of str to (inputs, outputs)
            Of each.
        """
        cases = {name: (list(inputs), list(made)) for name, (inputs, made) in arguments.items()}
        with self._compiled(_module(functions), target) as library:
            first, second = self.call(_run_kernels, library, cases)
        return {name: _same(first[name], second[name]) for name in first}

    def run_module(self, module: Any, target: Any, inputs: Sequence[Array]) -> list[Array]:
        """Do as `run` does for the function ``main`` of a Relax module, scheduled.

        Parameters
        ----------
        module : tvm.IRModule
            Relax functions, and kernels with intrinsics in place.
        target : tvm.target.Target
            What they are scheduled for.
        inputs : sequence of numpy.ndarray
            All arguments.
        """
        with self._compiled(module, target) as library:
            return _same(*self.call(_run_main, library, list(inputs)))

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

    @contextlib.contextmanager
    def _compiled(self, module: Any, target: Any) -> Iterator[Path]:
        """Compile a module to a library that is there while entered."""
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


# What follows runs in the process that has the GPU.


def _in_both_orders(function: Callable[[], Result]) -> tuple[Result, Result]:
    found = []
    for backwards in ("0", "1"):
        with _set({_BACKWARDS: backwards}):
            found.append(function())
    return found[0], found[1]


def _open(library: Path) -> tuple[Any, Any]:
    """Load a library, and return it and the GPU."""
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
