"""The numbered phases from an imported model to scheduled kernels, and on to TVM's VM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import tvm
from tvm import relax

from dcnv3_tvm import schedules
from dcnv3_tvm.errors import CompileError, InvalidArgumentError
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.schedules import ScheduledKernel
from dcnv3_tvm.schedules.records import Records
from dcnv3_tvm.signature import function_of
from dcnv3_tvm.targets import has_amx, is_gpu
from dcnv3_tvm.transform.align_storage import align_storage
from dcnv3_tvm.transform.convert_layout import convert_layout
from dcnv3_tvm.transform.expose_offsets import expose_offsets
from dcnv3_tvm.transform.fold_weights import fold_weights
from dcnv3_tvm.transform.fuse_center_feature import fuse_center_feature
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from dcnv3_tvm.transform.ir import Program
from dcnv3_tvm.transform.legalize import LEGALIZATIONS
from dcnv3_tvm.transform.lower_cpu import CpuTiling, lower_cpu
from dcnv3_tvm.transform.lower_gpu import lower_gpu
from dcnv3_tvm.transform.share_storage import is_storage, share_storage, storage_size

PHASES: Final = (
    "imported",
    "convert_layout",
    "fold_weights",
    "fuse_sampling",
    "fuse_center_feature",
    "expose_offsets",
    "lower_layers",
    "legalize",
    "fuse",
    "schedule",
)
"""Names of the phases in order. The dump of phase i is the file ``0i-name.py``."""

_VM_OPERATORS: Final = frozenset({"relax.call_tir", "relax.reshape", "relax.shape_of"})
"""Operators that TVM's virtual machine executes without a kernel."""


def run_pipeline(
    imported: ImportedModel,
    target: tvm.target.Target,
    *,
    dtype: str = "float32",
    expose: bool = False,
    until: str = PHASES[-1],
    records: Records | None = None,
    debug_dump: Path | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> tuple[Program, dict[str, ScheduledKernel]]:
    """Lower an imported model to kernels scheduled for a target.

    Parameters
    ----------
    imported : ImportedModel
        From an importer.
    target : tvm.target.Target
        Target to schedule for.
    dtype : str
        Element type of matmul operands: float32, bfloat16, or on GPUs float16.
    expose : bool
        Whether to add the entry that returns the offsets.
    until : str
        Last phase to run, one of `PHASES`.
    records : Records, optional
        Tuning records to schedule kernels with.
    debug_dump : Path, optional
        Folder for the module after each phase, as TVMScript.
    on_phase : callable, optional
        Called with the name of each phase before it runs.

    Returns
    -------
    program : Program
        Relax functions that call scheduled kernels, and the weights in the layout these take.
    kernels : dict of str to ScheduledKernel
        How each kernel was scheduled.

    Raises
    ------
    CompileError
        If the model has operators that cannot be compiled.
    InvalidArgumentError
        If `debug_dump` cannot be written to.
    """
    kernels: dict[str, ScheduledKernel] = {}

    def lower(program: Program) -> Program:
        if is_gpu(target):
            return lower_gpu(program, schedules.choose_run, dtype)
        tiling = CpuTiling(
            weight_tile_width=lambda outputs: schedules.weight_tile_width(outputs, target),
            row_slack=schedules.row_slack,
            matrix_tiles=has_amx(target),
        )
        return lower_cpu(program, tiling, dtype)

    def schedule(program: Program) -> Program:
        module, scheduled = schedules.schedule_module(program.module, target, records=records)
        kernels.update(scheduled)
        return Program(module, program.entries, program.weights)

    phases: tuple[Callable[[Program], Program], ...] = (
        # 0. The import as it is, for the dump.
        lambda program: program,
        # 1. NCHW to NHWC.
        convert_layout,
        # 2. Constant folding of everything that depends on weights alone.
        fold_weights,
        # 3. Softmax into DCNv3; its offset and mask projections to one matmul.
        fuse_sampling,
        # 4. Center-feature scaling (InternImage-H and G) into DCNv3.
        fuse_center_feature,
        # 5. If asked for, an entry that returns the offsets.
        expose_offsets if expose else lambda program: program,
        # 6. Layers that this package has kernels for to the target's variant of these.
        lower,
        # 7. The remaining operators to TVM's kernels.
        _legalize,
        # 8. Elementwise kernels into their producers.
        _fuse,
        # 9. Loops of every kernel, by rule and tuning record.
        schedule,
    )
    program = Program.of(imported)
    with target:
        for number, (name, phase) in enumerate(zip(PHASES, phases, strict=True)):
            if on_phase is not None:
                on_phase(name)
            program = phase(program)
            if debug_dump is not None:
                _dump(program.module, debug_dump / f"{number:02d}-{name}.py")
            if name == until:
                break
    return program.with_plain_names(), kernels


def _dump(module: tvm.IRModule, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module.script(show_meta=True), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            "the module cannot be written to debug_dump", got=f"{error.strerror} ({path})"
        ) from error


def _legalize(program: Program) -> Program:
    """Lower all operators to kernels, or raise an error that lists those without one."""
    legalized = program.transformed(
        tvm.transform.Sequential(
            [
                relax.transform.DecomposeOpsForInference(),
                relax.transform.CanonicalizeBindings(),
                relax.transform.LegalizeOps(LEGALIZATIONS),
            ]
        )
    )
    unsupported = []
    for name in legalized.entries:
        for block in legalized.module[name].body.blocks:
            for binding in block.bindings:
                call = binding.value
                operator = getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""
                if operator.startswith(("relax.", "dcnv3_tvm.")) and operator not in _VM_OPERATORS:
                    unsupported.append(f"{operator} in {name}: {call.ty}")
    if unsupported:
        raise CompileError(
            "these operators cannot be lowered to kernels",
            got="; ".join(unsupported[:5]),
            hint="If a shape is unknown at compile time, import the model with a fixed image "
            "size; otherwise replace them by other PyTorch functions.",
        )
    return legalized


def _fuse(program: Program) -> Program:
    fused = program.transformed(
        tvm.transform.Sequential(
            [
                # A reshape becomes a view of the same memory; otherwise it would be fused as a
                # copy.
                relax.transform.RewriteDataflowReshape(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )
    )
    # Rebuilding moves the kernels of results to the end.
    return fused.rebuilt(lambda *_: None)


def plan_memory(program: Program, target: tvm.target.Target) -> tuple[tvm.IRModule, dict[str, int]]:
    """Plan the storage of intermediate results, reused where lifetimes do not overlap.

    Entries for several image sizes use the same storage.

    Returns
    -------
    module : tvm.IRModule
        With storage allocated in each function.
    activation_bytes : dict of str to int
        Size of the storage that each entry needs. Entries with dynamic shapes are left out.
    """
    passes = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
        ]
    )
    with target:
        module = passes(program.module)
    if not is_gpu(target):
        for name in program.entries:
            module.update_func(module.get_global_var(name), share_storage(module[name]))
    sizes = {name: _storage_bytes(module[name]) for name in program.entries}
    if len(set(map(function_of, sizes))) < len(sizes):
        aligned = align_storage([module[name] for name in sizes])
        for name, function in zip(sizes, aligned, strict=True):
            module.update_func(module.get_global_var(name), function)
    return module, {name: size for name, size in sizes.items() if size is not None}


def _storage_bytes(function: relax.Function) -> int | None:
    """Return the planned storage of a function; None if a size is dynamic."""
    total = 0
    for block in function.body.blocks:
        for binding in filter(is_storage, block.bindings):
            size = storage_size(binding)
            if not isinstance(size, tvm.tirx.IntImm):
                return None
            total += int(size)
    return total


def lower_to_vm() -> tvm.transform.Pass:
    """Return the passes from planned memory to a program of TVM's virtual machine."""
    return tvm.transform.Sequential(
        [
            # Has an effect under `device_pipeline.lowering(graph=True)`. Kernels that read an input
            # or write an output stay outside of the graph, because these move between calls. The
            # attribute num_input of a function says that its other parameters do not.
            relax.transform.RewriteCUDAGraph(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
