"""Compile an imported model to an artifact, or to a model ready to be called."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import tvm
from tvm import relax

from dcnv3_tvm import checks, files, targets
from dcnv3_tvm.compiler import artifact, cpu_pipeline, pipeline
from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.compiler.cuda.export import export_executable
from dcnv3_tvm.compiler.image_sizes import join_sizes
from dcnv3_tvm.compiler.kernel_checks import UNCHECKED_KERNELS
from dcnv3_tvm.compiler.kernel_work import module_work
from dcnv3_tvm.compiler.linker import find_linker, system_to_build
from dcnv3_tvm.compiler.runtime_wheel import runtime_libraries
from dcnv3_tvm.compiler.schedule_checks import check_rules
from dcnv3_tvm.compiler.target_info import target_info
from dcnv3_tvm.errors import CompileError, DCNv3Warning, InvalidArgumentError, TargetError
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.runtime import CompiledModel, load
from dcnv3_tvm.runtime.loading import check_amx, check_target
from dcnv3_tvm.runtime.metadata import AMX_RULE, ArtifactMetadata
from dcnv3_tvm.schedules.records import find_records
from dcnv3_tvm.signature import OFFSETS
from dcnv3_tvm.systems import this_system

DTYPES: Final = ("float32", "bfloat16", "float16")
"""Element types of matmul operands that a model can be compiled for. Accumulators, the model's
inputs and its outputs are float32."""


def compile_model(
    imported: ImportedModel | Sequence[ImportedModel],
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    database: str | os.PathLike[str] = "default",
    cuda_graph: bool = True,
    expose: Literal["offsets"] | None = None,
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> CompiledModel:
    """Compile an imported model for this machine.

    Parameters
    ----------
    imported : ImportedModel or sequence of ImportedModel
        From `dcnv3_tvm.frontend.import_model` or `import_onnx`. Several are imports of one model
        at different image sizes: the compiled model takes images of each, with one copy of the
        weights. The size of the first is the default of `CompiledModel.preprocess`.
    target : str or tvm.target.Target
        ``"auto"`` is this machine's CPU and ``"cuda"`` its GPU. ``"cpu-znver4"``,
        ``"cuda-sm90"`` and ``"llvm -mcpu=..."`` name one.
    dtype : str
        Element type of the matmul operands: ``"float32"``; on GPUs also ``"float16"`` and
        ``"bfloat16"``; on CPUs with AMX, with the fast ``avx512_bf16`` of AMD's Zen 4 and later and
        of Cooper Lake, or with Arm's ``bf16``, also ``"bfloat16"``, which stands for float32 on
        other CPUs, with a warning. Inputs and outputs are float32.
    database : str or path
        Tuning records to schedule kernels with: ``"default"`` for those shipped with this package,
        ``"none"``, or a folder written by `dcnv3-tvm tune`.
    cuda_graph : bool
        On a GPU, capture the kernels of a model with static shapes into a CUDA graph in the first
        call, and replay it afterwards.
    expose : str, optional
        ``"offsets"`` adds an entry that returns the offset and the mask of each DCNv3, for
        `CompiledModel.offsets` and `dcnv3_tvm.visualize`. It shares the weights of the others,
        which are not changed.
    debug_dump : path, optional
        Folder for the module after each phase of the pipeline, as TVMScript.
    on_phase : callable, optional
        Called with the name of each phase before it runs, to show progress.

    Returns
    -------
    CompiledModel
        Loaded; `save` writes it to a folder.

    Raises
    ------
    CompileError
        If the model has operators that cannot be compiled.
    InvalidArgumentError
        If several models are not imports of one, `dtype` is not supported on any target, `expose`
        is unknown, or `debug_dump` cannot be written to.
    TargetError
        If the target is unknown, does not support `dtype`, or is not this machine
        (use `compile_artifact` for another machine).
    RecordsError
        If `database` holds no records, or records for another target or version of TVM.
    """
    # Loading checks the target as well, but after minutes of compilation.
    resolved = targets.resolve_target(target)
    amx = dtype == "bfloat16" and targets.has_amx(resolved)
    about = target_info(resolved, amx=amx)
    if about.is_for_another_system:
        raise TargetError(
            "a model for another system cannot be called on this machine",
            got=about.slug,
            allowed=this_system().name,
            hint="Write it with compile_artifact(imported, folder, target=...), and load it there.",
        )
    check_target(about)
    if amx:
        check_amx()
    folder = files.temporary_folder()
    destination = Path(folder.name) / "artifact"
    compile_artifact(
        imported,
        destination,
        target=target,
        dtype=dtype,
        database=database,
        cuda_graph=cuda_graph,
        expose=expose,
        debug_dump=debug_dump,
        on_phase=on_phase,
    )
    return load(destination, owner=folder)


def compile_artifact(
    imported: ImportedModel | Sequence[ImportedModel],
    destination: str | os.PathLike[str],
    *,
    target: str | Any = "auto",
    dtype: str = "float32",
    database: str | os.PathLike[str] = "default",
    cuda_graph: bool = True,
    expose: Literal["offsets"] | None = None,
    runtime_wheel: str | os.PathLike[str] | None = None,
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> ArtifactMetadata:
    """Compile an imported model to an artifact folder, for this machine or another.

    Parameters
    ----------
    imported, target, dtype, database, cuda_graph, expose, debug_dump, on_phase
        As in `compile_model`.
    destination : path
        Folder to write. An artifact in it is replaced once the new one is complete.
    runtime_wheel : path, optional
        For another system: the wheel of ``apache-tvm`` for it, whose runtime library the artifact
        gets. By default pip downloads it once; if it cannot, the artifact has none.

    Returns
    -------
    ArtifactMetadata
        The artifact's metadata.

    Raises
    ------
    CompileError, InvalidArgumentError, TargetError, RecordsError
        As in `compile_model`, but the target may be another machine.
    ArtifactError
        If the folder cannot be written.
    MissingDependencyError
        If there is no linker for the target.

    Warns
    -----
    DCNv3Warning
        If the artifact gets no runtime library.
    """
    joined = join_sizes(imported)
    destination = checks.path("destination", destination)
    if debug_dump is not None:
        checks.outside("debug_dump", checks.path("debug_dump", debug_dump), destination)
    if expose not in (None, OFFSETS):
        raise InvalidArgumentError("expose is unknown", got=repr(expose), allowed=repr(OFFSETS))
    resolved = targets.resolve_target(target)
    check_buildable(resolved)
    dtype = effective_dtype(dtype, resolved)
    runtime = runtime_libraries(
        system_to_build(resolved),
        on_gpu=targets.is_gpu(resolved),
        wheel=None if runtime_wheel is None else checks.path("runtime_wheel", runtime_wheel),
    )
    records = find_records(resolved, database)
    program, kernels = pipeline.run_pipeline(
        joined,
        resolved,
        dtype=dtype,
        expose=expose is not None,
        records=records,
        debug_dump=None if debug_dump is None else Path(debug_dump),
        on_phase=on_phase,
    )
    check_rules(kernels, on_gpu=targets.is_gpu(resolved))
    if on_phase is not None:
        on_phase("build")
    planned, activation_bytes = pipeline.plan_memory(program, resolved)
    rules = {name: found.rule for name, found in kernels.items()}
    metadata = ArtifactMetadata(
        name=joined.name,
        entries=program.entries,
        target=target_info(resolved, amx=AMX_RULE in rules.values()),
        dtype=dtype,
        config=joined.config,
        preprocessing=joined.preprocessing,
        sizes=joined.sizes,
        labels=joined.labels,
        kernels=rules,
        work=module_work(program.module, rules),
        records={name: found.record for name, found in kernels.items() if found.record},
        records_from={} if records is None else dataclasses.asdict(records.about),
        activation_bytes=activation_bytes,
    )
    with files.temporary_folder("build-") as folder:
        library = Path(folder) / "model.so"
        static = activation_bytes.keys() == program.entries.keys()
        build_library(planned, resolved, library, cuda_graph=cuda_graph and static)
        if on_phase is not None:
            on_phase("write")
        artifact.write(
            destination,
            library=library,
            weights=program.weights,
            metadata=metadata,
            runtime=runtime,
        )
    return metadata


def check_buildable(target: tvm.target.Target) -> None:
    """Check that this machine can link code for a target.

    Raises
    ------
    MissingDependencyError
        If there is no linker for the target's system.
    TargetError
        If its system is unknown.
    """
    find_linker(system_to_build(target))


def check_dtype(dtype: str, target: tvm.target.Target) -> None:
    """Check that matmuls with operands of a dtype are supported on a target.

    Raises
    ------
    InvalidArgumentError
        If no target supports the dtype.
    TargetError
        If this target does not.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError(
            "models cannot be compiled for this dtype", got=repr(dtype), allowed=", ".join(DTYPES)
        )
    if dtype == "float16" and not targets.is_gpu(target):
        raise TargetError(
            "float16 is not supported on CPUs",
            got=targets.target_slug(target),
            allowed="float32 and bfloat16 on CPUs; float16 on GPUs, such as cuda-sm90",
        )


def effective_dtype(dtype: str, target: tvm.target.Target) -> str:
    """Return the element type that matmuls get: float32 where bfloat16 gains nothing.

    Parameters
    ----------
    dtype : str
        What was asked for.
    target : tvm.target.Target
        The target.

    Raises
    ------
    InvalidArgumentError, TargetError
        As for `check_dtype`.

    Warns
    -----
    DCNv3Warning
        If it is another one.
    """
    check_dtype(dtype, target)
    if dtype != "bfloat16" or targets.is_gpu(target) or targets.has_fast_bfloat16(target):
        return dtype
    warnings.warn(
        f"bfloat16 gains nothing on {targets.target_slug(target)}, without AMX (of "
        "cpu-sapphirerapids and later, where the system offers it) and without fast dot products "
        "(of cpu-znver4, cpu-znver5, cpu-cooperlake, and Arm's such as linux-aarch64:neoverse-v1): "
        "compiling in float32",
        DCNv3Warning,
        stacklevel=3,
    )
    return "float32"


def build_library(
    module: tvm.IRModule, target: tvm.target.Target, library: Path, *, cuda_graph: bool
) -> None:
    """Build a module with planned memory to a shared library.

    Parameters
    ----------
    module : tvm.IRModule
        From `pipeline.plan_memory`.
    target : tvm.target.Target
        The target its kernels are scheduled for.
    library : Path
        The file to write.
    cuda_graph : bool
        On a GPU, capture the kernels between inputs and outputs into CUDA graphs.

    Raises
    ------
    CompileError
        If TVM, nvcc or the linker fails.
    """
    on_gpu = targets.is_gpu(target)
    try:
        with (
            device_pipeline.lowering(graph=cuda_graph)
            if on_gpu
            else tvm.transform.PassContext(config=UNCHECKED_KERNELS)
        ):
            executable = relax.build(
                module,
                target,
                relax_pipeline=pipeline.lower_to_vm(),
                tir_pipeline=(device_pipeline if on_gpu else cpu_pipeline).PIPELINE,
            )
    except RuntimeError as error:
        raise CompileError(
            "TVM cannot build the model",
            got=str(error).strip().splitlines()[-1],
            hint="Compile with debug_dump=DIR to see the module after each phase.",
        ) from error
    try:
        if on_gpu:
            export_executable(executable.mod, library, str(target.attrs["arch"]))
        else:
            executable.export_library(str(library), fcompile=find_linker(system_to_build(target)))
    except (RuntimeError, OSError, ValueError) as error:
        raise CompileError(
            "the compiled code cannot be linked to a library",
            got=str(error).strip().splitlines()[0],
            hint="Set CXX to another C++ compiler, or unset it.",
        ) from error
