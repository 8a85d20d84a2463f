"""Run kernels and an encoder for AArch64 under QEMU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import tvm

from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.compiler.compile import compile_artifact
from dcnv3_tvm.compiler.linker import find_linker, system_to_build
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target

_REPOSITORY: Final = Path(__file__).parents[2]
_SYSTEM: Final = _REPOSITORY / "build" / "arm64"
_RUN: Final = _REPOSITORY / "tests" / "emulated_arm64" / "run.py"

Array = np.ndarray[Any, np.dtype[Any]]


class Problem(NamedTuple):
    """A kernel that is not scheduled, its inputs, and the shape of its output, in float32."""

    function: tvm.tirx.PrimFunc
    inputs: list[Array]
    shape: tuple[int, ...]


def missing() -> str | None:
    """Return what is missing to run code for AArch64; None if nothing is."""
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed"
    if not (_SYSTEM / "site" / "tvm_ffi").is_dir():
        return f"there is no Python for AArch64: run {_RUN.with_name('install.sh')}"
    return None


def run(
    folder: Path,
    target: str,
    problems: Mapping[str, Problem],
    imported: ImportedModel,
    image: Array,
    dtype: str = "float32",
) -> tuple[dict[str, Array], list[Array]]:
    """Compile kernels and an encoder for AArch64, and run them in one process.

    Parameters
    ----------
    folder : Path
        An empty folder.
    target : str
        Target to compile for.
    problems : mapping of str to Problem
        Kernels to run.
    imported, image
        Encoder to run, and its input.
    dtype : str
        Element type of the encoder's matmuls.

    Returns
    -------
    dict of str to ndarray
        Results of the kernels.
    list of ndarray
        Outputs of the encoder: of its entry ``main``, then its feature maps.
    """
    (wheel,) = (_SYSTEM / "downloads").glob("apache_tvm-*.whl")
    compile_artifact(imported, folder / "encoder", target=target, dtype=dtype, runtime_wheel=wheel)
    np.save(folder / "image.npy", image)
    resolved = resolve_target(target)
    functions = {
        name: problem.function.with_attr("global_symbol", name)
        for name, problem in problems.items()
    }
    module, _ = schedule_module(tvm.IRModule(functions), resolved)
    built = tvm.compile(module, target=resolved, tir_pipeline=cpu_pipeline.PIPELINE)
    linker = find_linker(system_to_build(resolved))
    built.mod.export_library(str(folder / "kernels.so"), fcompile=linker)
    for name, problem in problems.items():
        np.savez(folder / f"{name}.npz", *problem.inputs)
    shapes = {name: problem.shape for name, problem in problems.items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    _emulate(folder)
    results = {name: np.load(folder / f"{name}.out.npy") for name in problems}
    outputs = np.load(folder / "outputs.npz")
    return results, [outputs[name] for name in outputs.files]


def _emulate(folder: Path) -> None:
    libraries = [_SYSTEM / path / "aarch64-linux-gnu" for path in ("lib", "usr/lib")]
    settings = {
        "LD_LIBRARY_PATH": libraries,
        "PYTHONHOME": [_SYSTEM / "usr"],
        "PYTHONPATH": [_SYSTEM / "site", _REPOSITORY, _REPOSITORY / "tests"],
    }
    command = ["qemu-aarch64", "-cpu", "max", "-L", str(_SYSTEM)]
    for name, paths in settings.items():
        command += ["-E", f"{name}={os.pathsep.join(map(str, paths))}"]
    command += ["-E", "PYTHONDONTWRITEBYTECODE=1", str(_SYSTEM / "usr/bin/python3")]
    done = subprocess.run(
        [*command, str(_RUN), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
