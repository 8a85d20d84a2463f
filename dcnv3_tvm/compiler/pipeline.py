"""The way of a model from its import to scheduled kernels, in numbered phases."""

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
from dcnv3_tvm.targets import is_gpu
from dcnv3_tvm.transform.convert_layout import convert_layout
from dcnv3_tvm.transform.fold_weights import fold_weights
from dcnv3_tvm.transform.fuse_center_feature import fuse_center_feature
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from dcnv3_tvm.transform.ir import Program
from dcnv3_tvm.transform.legalize import LEGALIZATIONS
from dcnv3_tvm.transform.lower_cpu import lower_layers
from dcnv3_tvm.transform.lower_gpu import lower_layers_gpu

PHASES: Final = (
    "imported",
    "convert_layout",
    "fold_weights",
    "fuse_sampling",
    "fuse_center_feature",
    "lower_layers",
    "legalize",
    "fuse",
    "schedule",
)
"""Names of the phases, in order; a dump of phase i is the file ``0i-name.py``."""

_KEPT: Final = frozenset({"relax.call_tir", "relax.reshape", "relax.shape_of"})
"""Operators that TVM's virtual machine runs without a kernel."""


def run_pipeline(
    imported: ImportedModel,
    target: tvm.target.Target,
    *,
    dtype: str = "float32",
    until: str = PHASES[-1],
    records: Records | None = None,
    debug_dump: Path | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> tuple[Program, dict[str, ScheduledKernel]]:
    """Lower an imported model to kernels scheduled for a target.

    Parameters
    ----------
    imported : ImportedModel
        What an importer gave.
    target : tvm.target.Target
        What to schedule for.
    dtype : str
        Element type of the operands of products: float32, bfloat16, on GPUs float16 too.
    until : str
        Last phase to run, one of `PHASES`.
    records : Records, optional
        Tuning records, which decide on schedules.
    debug_dump : Path, optional
        Folder for the module after each phase, as TVMScript.
    on_phase : callable, optional
        Called with the name of each phase before it runs.

    Returns
    -------
    program : Program
        Relax functions that call scheduled kernels, and the weights as these want them.
    kernels : dict of str to ScheduledKernel
        How each kernel was scheduled.

    Raises
    ------
    CompileError
        If the model has operators that cannot be compiled.
    InvalidArgumentError
        If `debug_dump` cannot be written to.
    """
    program = Program.of(imported)
    kernels: dict[str, ScheduledKernel] = {}

    def schedule(before: Program) -> Program:
        module, taken = schedules.schedule_module(before.module, target, records=records)
        kernels.update(taken)
        return Program(module, before.entries, before.weights)

    steps: dict[str, Callable[[Program], Program]] = {
        "imported": lambda before: before,
        "convert_layout": convert_layout,
        "fold_weights": fold_weights,
        "fuse_sampling": fuse_sampling,
        "fuse_center_feature": fuse_center_feature,
        "lower_layers": lambda before: (
            lower_layers_gpu(before, dtype)
            if is_gpu(target)
            else lower_layers(
                before, lambda outputs: schedules.weight_tile_width(outputs, target), dtype
            )
        ),
        "legalize": lambda before: _legalized(before.transformed(_legalize())),
        # Rebuilt, so that the kernels of results are last.
        "fuse": lambda before: before.transformed(_fuse()).rebuilt(lambda *_: None),
        "schedule": schedule,
    }
    with target:
        for number, name in enumerate(PHASES[: PHASES.index(until) + 1]):
            if on_phase is not None:
                on_phase(name)
            program = steps[name](program)
            if debug_dump is not None:
                _dump(program.module, debug_dump / f"{number:02d}-{name}.py")
    return program.with_plain_names(), kernels


def _dump(module: tvm.IRModule, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module.script(show_meta=True), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            "the module cannot be written where debug_dump says",
            got=f"{error.strerror} ({path})",
        ) from error


def _legalize() -> tvm.transform.Pass:
    return tvm.transform.Sequential(
        [
            relax.transform.DecomposeOpsForInference(),
            relax.transform.CanonicalizeBindings(),
            relax.transform.LegalizeOps(LEGALIZATIONS),
        ]
    )


def _legalized(program: Program) -> Program:
    """Refuse a program that still calls operators for which TVM found no kernel."""
    left = []
    for name in program.entries:
        for block in program.module[name].body.blocks:
            for binding in block.bindings:
                call = binding.value
                operator = getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""
                if operator.startswith(("relax.", "dcnv3_tvm.")) and operator not in _KEPT:
                    left.append(f"{operator} in {name}: {call.ty}")
    if left:
        raise CompileError(
            "these operators cannot be lowered to kernels",
            got="; ".join(left[:5]),
            hint="Where a shape is not known before run time, import the model with a fixed image "
            "size; otherwise write them with other PyTorch functions.",
        )
    return program


def _fuse() -> tvm.transform.Pass:
    return tvm.transform.Sequential(
        [
            # A reshape stays a view of the same memory, so that nothing is fused into a copy.
            relax.transform.RewriteDataflowReshape(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )


def plan_memory(program: Program, target: tvm.target.Target) -> tuple[tvm.IRModule, dict[str, int]]:
    """Give every intermediate result its place in memory, shared by those that never meet.

    Returns
    -------
    module : tvm.IRModule
        With the storage of each function.
    sizes : dict of str to int
        Bytes of that storage by entry; an entry with sizes known only at run time is left out.
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
    sizes = {name: _storage(module[name]) for name in program.entries}
    return module, {name: size for name, size in sizes.items() if size is not None}


def _storage(function: relax.Function) -> int | None:
    """Add up the planned storage of a function; None where a size is known only at run time."""
    total = 0
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if getattr(getattr(call, "op", None), "name", "") != "relax.memory.alloc_storage":
                continue
            size = call.args[0].values[0]
            if not isinstance(size, tvm.tirx.IntImm):
                return None
            total += int(size)
    return total


def lower_passes() -> tvm.transform.Pass:
    """Return the passes from planned memory to a program for TVM's virtual machine."""
    return tvm.transform.Sequential(
        [
            # Does something where `cuda.lowering` asks for it. A kernel that reads an input or
            # writes an output stays outside of the graph, because they are elsewhere in each call;
            # weights are known to stay by the attribute num_input of a function.
            relax.transform.RewriteCUDAGraph(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
