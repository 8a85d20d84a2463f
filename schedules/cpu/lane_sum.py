"""Sum the lanes of vector registers by shuffles."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import functools
import itertools

from tvm import s_tir, tirx
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.loops import vector_width
from dcnv3_tvm.schedules.cpu.vector_function import VectorFunction


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


def sum_lanes(sch: s_tir.Schedule, total: SBlockRV, row: LoopRV, task: LoopRV, dtype: str) -> None:
    """Replace a block that adds the elements of each of some vectors by shuffles of their lanes.

    See tvm_workarounds: vector-sum.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    total : SBlockRV
        Reduction block.
    row : LoopRV
        Loop over the vectors; the loop over the 2, 4, 8 or 16 lanes of a vector is inside it.
    task : LoopRV
        A loop around it.
    dtype : str
        Element type, float32 or float64.
    """
    lane = sch.get_loops(total)[-1]
    rows, width = (int(sch.get(loop).extent) for loop in (row, lane))
    sch.decompose_reduction(total, row)
    # The block of a single vector has no axis for it.
    sch.tensorize(row if rows > 1 else lane, _intrinsic(rows, width, dtype))
    sch.annotate(task, "pragma_import_llvm", _code(rows, width, dtype))


def _name(rows: int, width: int, dtype: str) -> str:
    return f"dcnv3_tvm_sum_{dtype}x{rows}x{width}"


def _code(rows: int, width: int, dtype: str) -> str:
    """Return an LLVM function that adds the sums of `rows` vectors to as many numbers.

    Two vectors become one of half sums, the halves of the first before those of the second, until
    each element is the sum of a vector: three instructions for two vectors, at every level.
    """
    function = VectorFunction(_name(rows, width, dtype), "ab", dtype)

    def add_halves(first: str, second: str, length: int) -> str:
        lower = [lane for lane in range(2 * width) if lane % length < length // 2]
        upper = [lane + length // 2 for lane in lower]
        halves = (function.shuffle(first, second, width, picked) for picked in (lower, upper))
        return function.calculate("fadd", width, *halves)

    for start in range(0, rows, width):
        count = min(width, rows - start)
        level = [function.load("a", (start + row) * width, width, width) for row in range(count)]
        length = width  # elements that belong to one vector
        while length > 1:
            pairs = itertools.zip_longest(level[::2], level[1::2], fillvalue="poison")
            level = [add_halves(*pair, length) for pair in pairs]
            length //= 2
        sums = function.shuffle(level[0], "poison", width, range(count))
        total = function.calculate("fadd", count, function.load("b", start, count, count), sums)
        function.store(total, "b", start, count, count)
    return function.code()


@functools.cache
def _intrinsic(rows: int, width: int, dtype: str) -> str:
    """Register the sums of `rows` vectors of `width` lanes and return its name."""
    name = _name(rows, width, dtype)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, width), dtype, offset_factor=1)
        B = T.match_buffer(b, (rows,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:rows], A[0:rows, 0:width])
            T.writes(B[0:rows])
            for i, j in T.grid(rows, width):
                with T.sblock("sum"):
                    row, lane = T.axis.remap("SR", [i, j])
                    B[row] = B[row] + A[row, lane]

    @T.prim_func(s_tir=True)
    def description_of_one(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (1, width), dtype, offset_factor=1)
        B = T.match_buffer(b, (1,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:1], A[0:1, 0:width])
            T.writes(B[0:1])
            for j in T.serial(0, width):
                with T.sblock("sum"):
                    lane = T.axis.remap("R", [j])
                    B[0] = B[0] + A[0, lane]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, width), dtype, offset_factor=1)
        B = T.match_buffer(b, (rows,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:rows], A[0:rows, 0:width])
            T.writes(B[0:rows])
            T.evaluate(T.call_extern("int32", name, A.access_ptr("r"), B.access_ptr("rw")))

    wanted = description_of_one if rows == 1 else description
    TensorIntrin.register(name, wanted, implementation, override=True)
    return name
