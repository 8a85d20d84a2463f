"""From an imported model to an artifact that is loaded and ready to run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import tvm
from tvm import relax

from dcnv3_tvm import schedules, targets
from dcnv3_tvm.compiler import artifact, pipeline
from dcnv3_tvm.errors import CompileError, InvalidArgumentError, TargetError
from dcnv3_tvm.imported import ImportedModel
from dcnv3_tvm.runtime import CompiledModel, load
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, TargetInfo

DTYPES: Final = ("float32", "bfloat16")
"""Element types a model can be compiled for: those of the operands of its products. Sums, the
residual stream, the model's inputs and its outputs are float32."""


def compile_model(
    imported: ImportedModel,
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> CompiledModel:
    """Compile an imported model.

    Parameters
    ----------
    imported : ImportedModel
        What `dcnv3_tvm.frontend.import_model` gave.
    target : str or tvm.target.Target
        ``"auto"`` is this machine's processor; ``"cpu-znver4"`` or ``"llvm -mcpu=..."`` another.
    dtype : str
        ``"float32"``, or ``"bfloat16"`` for products with operands of bfloat16 and sums of float32,
        which takes a processor with ``avx512_bf16``. Inputs and outputs stay float32.
    debug_dump : path, optional
        Folder for the module after each phase of the pipeline, as TVMScript.
    on_phase : callable, optional
        Called with the name of each phase before it runs, for showing progress.

    Returns
    -------
    CompiledModel
        Ready to be called where the target is this machine; `save` writes it to a folder.

    Raises
    ------
    CompileError
        If the model has operators that cannot be compiled.
    TargetError
        If the target is unknown, has no dot product of bfloat16 where `dtype` asks for it, or is
        not this machine (`compile_artifact` compiles for others).
    """
    folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-")
    destination = Path(folder.name) / imported.name
    compile_artifact(
        imported, destination, target=target, dtype=dtype, debug_dump=debug_dump, on_phase=on_phase
    )
    return load(destination, owner=folder)


def compile_artifact(
    imported: ImportedModel,
    destination: str | os.PathLike[str],
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> ArtifactMetadata:
    """Compile an imported model into an artifact's folder, for this machine or another.

    Parameters
    ----------
    imported, target, dtype, debug_dump, on_phase
        As in `compile_model`.
    destination : path
        The folder to write; an artifact that is there is replaced when the new one is whole.

    Returns
    -------
    ArtifactMetadata
        What the artifact says about itself.

    Raises
    ------
    CompileError, TargetError
        As in `compile_model`.
    ArtifactError
        If the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError(
            "models are not compiled for this dtype", got=repr(dtype), allowed=", ".join(DTYPES)
        )
    resolved = targets.resolve_target(target)
    if dtype == "bfloat16" and not schedules.has_bfloat16_dot(resolved):
        raise TargetError(
            "the target multiplies no bfloat16",
            got=targets.target_slug(resolved),
            allowed="a processor with avx512_bf16, such as cpu-znver4 or cpu-cooperlake",
            hint='Compile with dtype="float32" (--dtype float32).',
        )
    program, kernels = pipeline.run_pipeline(
        imported,
        resolved,
        dtype=dtype,
        debug_dump=None if debug_dump is None else Path(debug_dump),
        on_phase=on_phase,
    )
    if on_phase is not None:
        on_phase("build")
    planned, activation_bytes = pipeline.plan_memory(program, resolved)
    metadata = ArtifactMetadata(
        name=imported.name,
        entries=program.entries,
        target=_target_info(resolved),
        dtype=dtype,
        config=imported.config,
        preprocessing=imported.preprocessing,
        kernels=kernels,
        activation_bytes=activation_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-build-") as folder:
        library = Path(folder) / "model.so"
        _build(planned, resolved, library)
        if on_phase is not None:
            on_phase("write")
        artifact.write(destination, library=library, weights=program.weights, metadata=metadata)
    return metadata


def _build(module: tvm.IRModule, target: tvm.target.Target, library: Path) -> None:
    try:
        executable = relax.build(module, target, relax_pipeline=pipeline.lower_passes())
    except RuntimeError as error:
        raise CompileError(
            "TVM cannot build the model",
            got=str(error).strip().splitlines()[-1],
            hint="Compile with debug_dump (--debug-dump DIR) to see the module after each phase.",
        ) from error
    try:
        executable.export_library(str(library))
    except (RuntimeError, OSError, ValueError) as error:
        raise CompileError(
            "the compiled code cannot be linked to a library",
            got=str(error).strip().splitlines()[0],
            hint="TVM calls the C++ compiler g++ (or $CXX) for this: install one.",
        ) from error


def _target_info(target: tvm.target.Target) -> TargetInfo:
    triple = target.attrs.get("mtriple") or tvm.target.codegen.llvm_get_system_triple()
    return TargetInfo(
        kind=target.kind.name,
        triple=str(triple),
        mcpu=str(target.attrs.get("mcpu", "")),
        features=tuple(sorted(targets.target_features(target))),
        slug=targets.target_slug(target),
        text=str(target),
    )
