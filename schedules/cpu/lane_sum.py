"""Sum the lanes of a vector register by shuffles."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import functools
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.loops import vector_width

_LLVM_TYPES: Final = {"float32": "float", "float64": "double"}
_SUFFIXES: Final = {"float32": "f32", "float64": "f64"}


def split_lanes(sch: s_tir.Schedule, total: SBlockRV, lanes: int) -> SBlockRV | None:
    """Split a sum over the innermost loop into sums by lane and, in `total`, the sum of the lanes.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    total : SBlockRV
        Block that sums over its innermost loop.
    lanes : int
        Elements of a vector register.

    Returns
    -------
    SBlockRV or None
        Block of the sums by lane, whose last axes are the lane and the step from vector to vector;
        None if no vector divides the loop.
    """
    loop = sch.get_loops(total)[-1]
    width = vector_width(static(sch.get(loop).extent), lanes)
    if width == 1:
        return None
    partial = sch.rfactor(sch.split(loop, [None, width])[1], factor_axis=-1)
    _order_axes(sch, partial, lane_first=True)
    _order_axes(sch, total, lane_first=False)
    return partial


def _order_axes(sch: s_tir.Schedule, stage: SBlockRV, *, lane_first: bool) -> None:
    """Order the block axes, which rfactor leaves in any order, as rows, lane, step."""
    kinds = [axis.iter_type for axis in sch.get(stage).iter_vars]
    step = kinds.index(tirx.IterVar.CommReduce)
    lane = [0] if lane_first else []
    rows = [axis for axis in range(len(lane), len(kinds)) if axis != step]
    sch.reorder_block_iter_var(stage, [*rows, *lane, step])


def sum_lanes(sch: s_tir.Schedule, total: SBlockRV, lane: LoopRV, task: LoopRV, dtype: str) -> None:
    """Replace a block that adds the elements of a vector by LLVM's vector reduction.

    See tvm_workarounds: vector-sum.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    total : SBlockRV
        Reduction block over `lane` only, in local memory.
    lane : LoopRV
        Its innermost loop, of extent 2, 4, 8 or 16.
    task : LoopRV
        A loop around it.
    dtype : str
        Element type, float32 or float64.
    """
    width = int(sch.get(lane).extent)
    sch.decompose_reduction(total, lane)
    sch.tensorize(lane, _intrinsic(width, dtype))
    sch.annotate(task, "pragma_import_llvm", _code(width, dtype))


def _name(width: int, dtype: str) -> str:
    return f"dcnv3_tvm_sum_{dtype}x{width}"


def _code(width: int, dtype: str) -> str:
    """Return LLVM code of the reduction."""
    scalar = _LLVM_TYPES[dtype]
    reduce = f"@llvm.vector.reduce.fadd.v{width}{_SUFFIXES[dtype]}"
    return f"""
declare {scalar} {reduce}({scalar}, <{width} x {scalar}>)

define {scalar} @{_name(width, dtype)}(<{width} x {scalar}> %vector) {{
  %sum = call reassoc {scalar} {reduce}({scalar} -0.0, <{width} x {scalar}> %vector)
  ret {scalar} %sum
}}
"""


@functools.cache
def _intrinsic(width: int, dtype: str) -> str:
    """Register the sum of `width` lanes and return its name."""
    name = _name(width, dtype)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (width,), dtype, offset_factor=1, scope="local")
        B = T.match_buffer(b, (1,), dtype, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(B[0:1], A[0:width])
            T.writes(B[0:1])
            for i in T.serial(0, width):
                with T.sblock("sum"):
                    lane = T.axis.remap("R", [i])
                    B[0] = B[0] + A[lane]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (width,), dtype, offset_factor=1, scope="local")
        B = T.match_buffer(b, (1,), dtype, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(B[0:1], A[0:width])
            T.writes(B[0:1])
            B[0] = B[0] + T.call_pure_extern(dtype, name, A.vload([0], f"{dtype}x{width}"))

    TensorIntrin.register(name, description, implementation, override=True)
    return name
