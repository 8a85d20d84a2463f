"""From an imported model to an artifact that is loaded and ready to run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import tvm
from tvm import relax

from dcnv3_tvm import schedules, targets
from dcnv3_tvm.compiler import artifact, pipeline
from dcnv3_tvm.compiler.cuda import cuda_module
from dcnv3_tvm.errors import CompileError, InvalidArgumentError, TargetError
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.runtime import CompiledModel, load
from dcnv3_tvm.runtime.loading import check_target
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, TargetInfo
from dcnv3_tvm.schedules.records import find_records

DTYPES: Final = ("float32", "bfloat16", "float16")
"""Element types a model can be compiled for: those of the operands of its products. Sums, the
model's inputs and its outputs are float32."""


def compile_model(
    imported: ImportedModel,
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    database: str | os.PathLike[str] = "default",
    cuda_graph: bool = True,
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> CompiledModel:
    """Compile an imported model.

    Parameters
    ----------
    imported : ImportedModel
        What `dcnv3_tvm.frontend.import_model` gave.
    target : str or tvm.target.Target
        ``"auto"`` is this machine's processor; ``"cpu-znver4"`` or ``"llvm -mcpu=..."`` another;
        ``"cuda"`` is this machine's GPU, ``"cuda-sm90"`` another.
    dtype : str
        ``"float32"``; on GPUs ``"float16"`` and ``"bfloat16"`` as well; on processors with
        ``avx512_bf16``, ``"bfloat16"`` for products with operands of bfloat16 and sums of float32.
        Inputs and outputs stay float32.
    database : str or path
        Tuning records, which decide on schedules where they have a kernel: ``"default"``, this
        package's own for the target; ``"none"``; or a folder that `dcnv3-tvm tune` wrote.
    cuda_graph : bool
        On a GPU, launch the kernels of a model of fixed sizes together, as a CUDA graph that is
        captured in the first call.
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
    InvalidArgumentError
        If `dtype` is none that models are compiled for, or `debug_dump` cannot be written to.
    TargetError
        If the target is unknown, does not compute in `dtype`, or is not this machine
        (`compile_artifact` compiles for others).
    RecordsError
        If the folder `database` holds no records, or records for another target or version of TVM.
    """
    # Not only when it is compiled: that takes minutes.
    check_target(target_info(targets.resolve_target(target)))
    folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-")
    destination = Path(folder.name) / "artifact"
    compile_artifact(
        imported,
        destination,
        target=target,
        dtype=dtype,
        database=database,
        cuda_graph=cuda_graph,
        debug_dump=debug_dump,
        on_phase=on_phase,
    )
    return load(destination, owner=folder)


def compile_artifact(
    imported: ImportedModel,
    destination: str | os.PathLike[str],
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    database: str | os.PathLike[str] = "default",
    cuda_graph: bool = True,
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> ArtifactMetadata:
    """Compile an imported model into an artifact's folder, for this machine or another.

    Parameters
    ----------
    imported, target, dtype, database, cuda_graph, debug_dump, on_phase
        As in `compile_model`.
    destination : path
        The folder to write; an artifact that is there is replaced when the new one is whole.

    Returns
    -------
    ArtifactMetadata
        What the artifact says about itself.

    Raises
    ------
    CompileError, InvalidArgumentError, TargetError, RecordsError
        As in `compile_model`, but the target may be another machine.
    ArtifactError
        If the folder cannot be written.
    """
    resolved = targets.resolve_target(target)
    check_dtype(dtype, resolved)
    records = find_records(resolved, database)
    program, kernels = pipeline.run_pipeline(
        imported,
        resolved,
        dtype=dtype,
        records=records,
        debug_dump=None if debug_dump is None else Path(debug_dump),
        on_phase=on_phase,
    )
    if on_phase is not None:
        on_phase("build")
    planned, activation_bytes = pipeline.plan_memory(program, resolved)
    metadata = ArtifactMetadata(
        name=imported.name,
        entries=program.entries,
        target=target_info(resolved),
        dtype=dtype,
        config=imported.config,
        preprocessing=imported.preprocessing,
        kernels={name: found.rule for name, found in kernels.items()},
        records={name: found.record for name, found in kernels.items() if found.record},
        records_from={} if records is None else dataclasses.asdict(records.about),
        activation_bytes=activation_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-build-") as folder:
        library = Path(folder) / "model.so"
        static = activation_bytes.keys() == program.entries.keys()
        build(planned, resolved, library, graph=cuda_graph and static)
        if on_phase is not None:
            on_phase("write")
        artifact.write(destination, library=library, weights=program.weights, metadata=metadata)
    return metadata


def check_dtype(dtype: str, target: tvm.target.Target) -> None:
    """Refuse a dtype that products are not made for on a target.

    Raises
    ------
    InvalidArgumentError
        If they are made for it on no target.
    TargetError
        With what the target takes instead.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError(
            "models are not compiled for this dtype", got=repr(dtype), allowed=", ".join(DTYPES)
        )
    if targets.is_gpu(target) or dtype == "float32":
        return
    if dtype == "float16":
        raise TargetError(
            "processors do not compute in float16 here",
            got=targets.target_slug(target),
            allowed="float32 and bfloat16 on processors; float16 on GPUs, such as cuda-sm90",
        )
    if not schedules.has_bfloat16_dot(target):
        raise TargetError(
            "the target multiplies no bfloat16",
            got=targets.target_slug(target),
            allowed="a GPU, or a processor with avx512_bf16: cpu-znver4, cpu-cooperlake",
            hint='Compile with dtype="float32" (--dtype float32).',
        )


def build(module: tvm.IRModule, target: tvm.target.Target, library: Path, *, graph: bool) -> None:
    """Build a module whose memory is planned into a shared library.

    Parameters
    ----------
    module : tvm.IRModule
        Relax functions and scheduled kernels.
    target : tvm.target.Target
        What they are scheduled for.
    library : Path
        The file to write.
    graph : bool
        Capture what is between inputs and outputs into CUDA graphs, on a GPU.

    Raises
    ------
    CompileError
        If TVM or a compiler behind it fails.
    """
    on_gpu = targets.is_gpu(target)
    try:
        with cuda_module.lowering(graph=graph) if on_gpu else contextlib.nullcontext():
            executable = relax.build(
                module,
                target,
                relax_pipeline=pipeline.lower_passes(),
                tir_pipeline=cuda_module.LOWERING if on_gpu else "default",
            )
    except RuntimeError as error:
        raise CompileError(
            "TVM cannot build the model",
            got=str(error).strip().splitlines()[-1],
            hint="Compile with debug_dump (--debug-dump DIR) to see the module after each phase.",
        ) from error
    try:
        if on_gpu:
            cuda_module.export(executable.mod, library, str(target.attrs["arch"]))
        else:
            executable.export_library(str(library))
    except (RuntimeError, OSError, ValueError) as error:
        raise CompileError(
            "the compiled code cannot be linked to a library",
            got=str(error).strip().splitlines()[0],
            hint="TVM calls the C++ compiler g++ (or $CXX) for this: install one.",
        ) from error


def target_info(target: tvm.target.Target) -> TargetInfo:
    """Describe a target for an artifact."""
    on_gpu = targets.is_gpu(target)
    host = target.host if on_gpu else target
    triple = host.attrs.get("mtriple") or tvm.target.codegen.llvm_get_system_triple()
    return TargetInfo(
        kind=target.kind.name,
        triple=str(triple),
        mcpu=str(host.attrs.get("mcpu", "")),
        features=tuple(sorted(targets.target_features(host))),
        slug=targets.target_slug(target),
        text=str(target),
        arch=str(target.attrs["arch"]) if on_gpu else "",
    )
