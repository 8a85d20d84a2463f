"""Rearrange and reduce the points of all groups of a pixel by shuffles of whole vectors.

The points of a pixel are contiguous, group after group, and vectors hold points of several groups.
TVM would load what is not contiguous element by element.
"""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import functools
from collections.abc import Sequence

from tvm import s_tir
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import SBlockRV
from tvm.script import tirx as T

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.vector_function import VectorFunction


def separate_pairs(sch: s_tir.Schedule, block: SBlockRV, lanes: int, dtype: str) -> None:
    """Replace the block ``offsets``, which separates alternating elements.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    block : SBlockRV
        ``B[element, group, point] = A[(group * points + point) * 2 + element]``.
    lanes : int
        Elements of a vector register.
    dtype : str
        Element type of A and B, a key of `vector_function.LLVM_TYPES`.
    """
    groups, points = _extents(sch, block)
    _replace(sch, block, 3, _pairs(groups, points, lanes, dtype))


def reduce_points(sch: s_tir.Schedule, block: SBlockRV, lanes: int, dtype: str) -> None:
    """Replace the block ``softmax_max`` or ``softmax_sum``, after its initialization.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    block : SBlockRV
        ``B[group] = max(B[group], A[group * points + point])``, or
        ``B[group] = B[group] + A[group, point]``.
    lanes, dtype
        As for `separate_pairs`.
    """
    groups, points = _extents(sch, block)
    largest = sch.get(block).name_hint == "softmax_max"
    sch.decompose_reduction(block, sch.get_loops(block)[-2])
    _replace(sch, block, 2, _reduction(largest, groups, points, lanes, dtype))


def subtract_from_points(sch: s_tir.Schedule, block: SBlockRV, lanes: int, dtype: str) -> None:
    """Replace the block ``softmax_shift``, which subtracts a number per group from each point.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    block : SBlockRV
        ``C[group, point] = A[group * points + point] - B[group]``.
    lanes, dtype
        As for `separate_pairs`.
    """
    groups, points = _extents(sch, block)
    _replace(sch, block, 2, _difference(groups, points, lanes, dtype))


def _extents(sch: s_tir.Schedule, block: SBlockRV) -> tuple[int, int]:
    groups, points = (static(sch.get(loop).extent) or 1 for loop in sch.get_loops(block)[-2:])
    return groups, points


def _replace(sch: s_tir.Schedule, block: SBlockRV, depth: int, intrinsic: tuple[str, str]) -> None:
    """Replace the innermost `depth` loops of a block."""
    name, code = intrinsic
    loops = sch.get_loops(block)
    sch.annotate(loops[-depth - 1], "pragma_import_llvm", code)
    sch.tensorize(loops[-depth], name)


@functools.cache
def _pairs(groups: int, points: int, lanes: int, dtype: str) -> tuple[str, str]:
    """Register the intrinsic of `separate_pairs`; returns its name and its LLVM code."""
    name = f"dcnv3_tvm_pairs_{dtype}x{groups}x{points}x{lanes}"
    count, align = groups * points, DTYPE_BYTES[dtype]
    function = VectorFunction(name, "ab", dtype)
    for start in range(0, count, lanes):
        width = min(lanes, count - start)
        first, second = (
            function.load("a", 2 * start + part * width, width, width) for part in (0, 1)
        )
        for element in (0, 1):
            value = function.shuffle(first, second, width, range(element, 2 * width, 2))
            function.store(value, "b", element * count + start, width, width)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (2 * count,), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (2, groups, points), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0 : 2 * count])
            T.writes(B[0:2, 0:groups, 0:points])
            for i, j, k in T.grid(2, groups, points):
                with T.sblock("copy"):
                    element, group, point = T.axis.remap("SSS", [i, j, k])
                    B[element, group, point] = A[(group * points + point) * 2 + element]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (2 * count,), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (2, groups, points), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0 : 2 * count])
            T.writes(B[0:2, 0:groups, 0:points])
            T.evaluate(T.call_extern("int32", name, A.access_ptr("r"), B.access_ptr("w")))

    TensorIntrin.register(name, description, implementation, override=True)
    return name, function.code()


@functools.cache
def _reduction(largest: bool, groups: int, points: int, lanes: int, dtype: str) -> tuple[str, str]:
    """Register the intrinsic of `reduce_points`; returns its name and its LLVM code."""
    operation = "max" if largest else "fadd"
    name = f"dcnv3_tvm_{operation}_{dtype}x{groups}x{points}x{lanes}"
    count, align = groups * points, DTYPE_BYTES[dtype]
    function = VectorFunction(name, "ab", dtype)
    for start in range(0, groups, lanes):
        rows = min(lanes, groups - start)
        vectors = _windows(function, operation, start * points, rows * points, points, lanes)
        total = function.load("b", start, rows, lanes)
        total = function.calculate(
            operation, lanes, total, _every(function, vectors, points, rows, lanes)
        )
        function.store(total, "b", start, rows, lanes)

    shape = (count,) if largest else (groups, points)
    whole = tuple(slice(0, size) for size in shape)

    @T.prim_func(s_tir=True)
    def description_of_max(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (count,), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (groups,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:groups], A[0:count])
            T.writes(B[0:groups])
            for i, j in T.grid(groups, points):
                with T.sblock("max"):
                    group, point = T.axis.remap("SR", [i, j])
                    B[group] = T.max(B[group], A[group * points + point])

    @T.prim_func(s_tir=True)
    def description_of_sum(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (groups, points), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (groups,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:groups], A[0:groups, 0:points])
            T.writes(B[0:groups])
            for i, j in T.grid(groups, points):
                with T.sblock("sum"):
                    group, point = T.axis.remap("SR", [i, j])
                    B[group] = B[group] + A[group, point]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, shape, dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (groups,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(B[0:groups], A[whole])
            T.writes(B[0:groups])
            T.evaluate(T.call_extern("int32", name, A.access_ptr("r"), B.access_ptr("rw")))

    description = description_of_max if largest else description_of_sum
    TensorIntrin.register(name, description, implementation, override=True)
    return name, function.code()


def _windows(
    function: VectorFunction, operation: str, first: int, count: int, points: int, lanes: int
) -> list[str]:
    """Reduce `points` elements from each of `count` on; the last ones are undefined.

    The result over 2 n elements is that over n, combined with itself n elements further.
    """
    level = [
        function.load("a", first + start, min(lanes, count - start), lanes)
        for start in range(0, count, lanes)
    ]

    def further(vectors: Sequence[str], distance: int) -> list[str]:
        """Return each vector as it is `distance` elements further."""
        whole, rest = divmod(distance, lanes)
        ahead = [*vectors[whole:], *["poison"] * (whole + 1)]
        picked = range(rest, rest + lanes)
        return [
            function.shuffle(ahead[i], ahead[i + 1], lanes, picked) if rest else ahead[i]
            for i in range(len(vectors))
        ]

    def combine(first: Sequence[str], second: Sequence[str]) -> list[str]:
        return [
            function.calculate(operation, lanes, *pair) for pair in zip(first, second, strict=True)
        ]

    result: list[str] | None = None
    done, length = 0, 1
    while True:
        if points & length:
            part = further(level, done)
            result = part if result is None else combine(result, part)
            done += length
        if done == points:
            assert result is not None
            return result
        level = combine(level, further(level, length))
        length *= 2


def _every(
    function: VectorFunction, vectors: Sequence[str], step: int, count: int, lanes: int
) -> str:
    """Pick every `step`-th of the elements of some vectors, `count` in all."""
    value = "poison"
    for place, vector in enumerate(vectors):
        picked: list[int | None] = [None] * lanes
        for index in range(count):
            source, lane = divmod(index * step, lanes)
            if source <= place:
                picked[index] = lanes + lane if source == place else index
        if any(lane is not None and lane >= lanes for lane in picked):
            value = function.shuffle(value, vector, lanes, picked)
    return value


@functools.cache
def _difference(groups: int, points: int, lanes: int, dtype: str) -> tuple[str, str]:
    """Register the intrinsic of `subtract_from_points`; returns its name and its LLVM code."""
    name = f"dcnv3_tvm_difference_{dtype}x{groups}x{points}x{lanes}"
    count, align = groups * points, DTYPE_BYTES[dtype]
    function = VectorFunction(name, "abc", dtype)

    def of_groups(start: int) -> str:
        return function.load("b", start, min(lanes, groups - start), lanes)

    for start in range(0, count, lanes):
        width = min(lanes, count - start)
        owners = [(start + lane) // points for lane in range(width)]
        first = owners[0] // lanes * lanes
        second = owners[-1] // lanes * lanes
        spread = function.shuffle(
            of_groups(first),
            of_groups(second) if second > first else "poison",
            lanes,
            [*(owner - first for owner in owners), *[None] * (lanes - width)],
        )
        value = function.load("a", start, width, lanes)
        difference = function.calculate("fsub", lanes, value, spread)
        function.store(difference, "c", start, width, lanes)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (count,), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (groups,), dtype, offset_factor=1)
        C = T.match_buffer(c, (groups, points), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:count], B[0:groups])
            T.writes(C[0:groups, 0:points])
            for i, j in T.grid(groups, points):
                with T.sblock("difference"):
                    group, point = T.axis.remap("SS", [i, j])
                    C[group, point] = A[group * points + point] - B[group]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (count,), dtype, offset_factor=1, align=align)
        B = T.match_buffer(b, (groups,), dtype, offset_factor=1)
        C = T.match_buffer(c, (groups, points), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:count], B[0:groups])
            T.writes(C[0:groups, 0:points])
            T.evaluate(
                T.call_extern(
                    "int32", name, A.access_ptr("r"), B.access_ptr("r"), C.access_ptr("w")
                )
            )

    TensorIntrin.register(name, description, implementation, override=True)
    return name, function.code()
