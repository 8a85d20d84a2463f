"""Matmuls and convolutions in blocks of AMX tiles on CPUs."""

from __future__ import annotations

import math
from typing import Any, Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.kernels import tile_convolution
from dcnv3_tvm.kernels import tile_matmul as definition
from dcnv3_tvm.kernels.packing import BLOCK
from dcnv3_tvm.kernels.tile_functions import BEGIN, END, IMPORT_CODE, PORTABLE_CODE
from dcnv3_tvm.op.expr import constant_factor, static
from dcnv3_tvm.schedules.blocks import block_names
from dcnv3_tvm.schedules.cpu.amx import AMX_CODE, ROUND
from dcnv3_tvm.schedules.cpu.loops import copy_in_parallel
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import has_amx

_LANES: Final = 16

_MAX_TOGETHER: Final = 16

_TASK_STEPS: Final = 100
"""Steps of a task, at least, so that tile configuration and workspaces take a small part of it."""

_TASKS: Final = 8
"""Tasks, at least, so that threads get about the same number."""

_CACHED_BYTES: Final = 1 << 20
"""Of an operand that stays in the L2 cache of a core, about half of it."""

_REUSE: Final = 8
"""Blocks of a task that share what they read of an operand that does not stay in the cache."""


_ROWS: Final = 4
"""Rows of blocks of a task that has a part of the columns. Of fewer rows, tasks are columns."""


def tile_matmul(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule matmuls and convolutions in blocks of sums.

    A block of sums stays in tile registers over the whole of K, and in the L1 cache until its
    epilogue is done. A task is one row or column of blocks, or several, or a part of the columns of
    some rows if these are few. The image of a convolution is padded first.
    """
    if refusal := refuse_other_kernels(func, definition.KERNEL, tile_convolution.KERNEL):
        return refusal
    # The axes before those of a step, but not that of columns of blocks, are runs and steps.
    steps = math.prod(int(size) for size in func.params[1].shape[1:-4])
    sch = s_tir.Schedule(func)
    sums, epilogue = sch.get_sblock("sums"), sch.get_sblock("epilogue")
    row, column = sch.get_loops(sums)
    sch.unannotate(row, IMPORT_CODE)
    *_, line, _ = sch.get_loops(epilogue)
    height = sch.get(line).extent

    # Step 1. Order the blocks. With rows in order, a core reads most of what it wrote in the kernel
    # before. With columns, it reads fewer weights.
    counts = {name: sch.get(loop).extent for name, loop in (("rows", row), ("columns", column))}
    rows, columns = (constant_factor(count) for count in counts.values())
    if static(counts["rows"]) is None:
        few = definition.has_many_weights(steps * BLOCK, columns * BLOCK)
    else:
        few = rows < (columns if _bytes(func.params[1]) > _CACHED_BYTES else min(columns, _ROWS))
    order = space.pick("order", list(counts), "columns" if few else "rows")
    loops = [row, column] if order == "rows" else [column, row]
    sch.reorder(*loops)

    # Step 2. Combine rows or columns of blocks to tasks.
    outer, inner = (rows, columns) if order == "rows" else (columns, rows)
    sizes = [size for size in range(1, _MAX_TOGETHER + 1) if outer % size == 0]
    fitting = [size for size in sizes if size == 1 or outer >= _TASKS * size]
    wanted = [size for size in fitting if size * inner * steps >= _TASK_STEPS]
    usual = min(wanted, default=fitting[-1])
    # Each row or column of blocks reads the other operand whole.
    exceeds = _bytes(func.params[order == "rows"]) > _CACHED_BYTES
    if exceeds:
        usual = max(usual, *(size for size in fitting if size <= _REUSE))
    # Rows too few for that many tasks are combined nevertheless, and their columns divided.
    divided = order == "rows" and outer < 2 * _TASKS
    if divided:
        usual = max(size for size in sizes if size <= _ROWS)
    together = space.pick("together", sizes, usual)
    parts = 1
    if divided:
        most = max(1, together * inner * steps // _TASK_STEPS)
        divisors = [size for size in range(1, inner + 1) if inner % size == 0 and size <= most]
        parts = min((p for p in divisors if p * outer >= _TASKS * together), default=divisors[-1])
    task, group = sch.split(loops[0], [None, together])
    part, others = sch.split(loops[1], [parts, None])
    # The operand of which a task reads a part stays in the L1 cache, unless the other exceeds L2.
    loops = [others, group] if exceeds or divided else [group, others]
    sch.reorder(task, part, *loops)
    task = sch.fuse(task, part)
    sch.parallel(task)

    # Step 3. Apply the epilogue to each block, and round a row at a time.
    rounded = "finished" in block_names(sch)
    if rounded:
        finished = sch.get_sblock("finished")
        sch.reverse_compute_at(finished, loops[1], preserve_unit_loops=True)
    sch.reverse_compute_at(epilogue, loops[1], preserve_unit_loops=True)
    *_, line, lane = sch.get_loops(epilogue)
    if rounded:
        sch.compute_at(finished, line, preserve_unit_loops=True)
        sch.set_scope(finished, 0, "local")
        _vectorize(sch, sch.get_loops(finished)[-1])
    if rounded and has_amx(target):
        half, vector = sch.split(lane, [None, _LANES])
        sch.unroll(half)
        sch.tensorize(vector, ROUND)
    else:
        _vectorize(sch, lane)

    # Step 4. Pad the image.
    if "padded" in block_names(sch):
        copy_in_parallel(sch, sch.get_sblock("padded"), _LANES)

    # Step 5. Import the functions, and configure the tiles in each task.
    sch.annotate(task, IMPORT_CODE, AMX_CODE if has_amx(target) else PORTABLE_CODE)
    _surround(sch, task, (height + 1) // 2)
    return sch.mod["main"]


def _bytes(param: tirx.Var) -> int:
    """Return the bytes of a tensor, more than `_CACHED_BYTES` for dynamic shapes."""
    elements = math.prod(static(size) or _CACHED_BYTES for size in param.shape)
    return elements * DTYPE_BYTES[param.dtype]


def _vectorize(sch: s_tir.Schedule, loop: LoopRV) -> None:
    _, vector = sch.split(loop, [None, _LANES])
    sch.vectorize(vector)


def _surround(sch: s_tir.Schedule, task: LoopRV, tile_rows: Any) -> None:
    """Call the functions that configure the tiles and release them, around the body of a loop."""
    reference = sch.get_sref(task)
    loop = reference.stmt
    begin = tirx.call_extern("int32", BEGIN, tile_rows)
    end = tirx.call_extern("int32", END)
    body = tirx.SeqStmt([tirx.Evaluate(begin), loop.body, tirx.Evaluate(end)])
    surrounded = tirx.For(
        loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations
    )
    sch.state.replace(reference, surrounded)
