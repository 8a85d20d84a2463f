"""Accumulate a register tile on AArch64, whose multiply-adds take one factor from any lane."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
from collections.abc import Sequence
from typing import Final

from tvm import s_tir
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from dcnv3_tvm.kernels.packing import PAIR
from dcnv3_tvm.schedules.cpu.register_tiles import VectorUnit

LANES: Final = 4
"""Sums in a vector register; also steps along the reduction axis whose inputs one load reads."""

_STEPS: Final = {"float32": LANES, "bfloat16": PAIR * LANES}
"""Input features that one load reads."""


def fits_lanes(unit: VectorUnit, columns: int, inputs: int, dtype: str) -> bool:
    """Whether `sum_by_lane` applies to a register tile.

    Parameters
    ----------
    unit : VectorUnit
        Vector registers of the target.
    columns : int
        Columns of the tile.
    inputs : int
        Input features.
    dtype : str
        Element type of the operands.
    """
    if not unit.by_lane or dtype not in _STEPS:
        return False
    return columns % LANES == 0 and inputs % _STEPS[dtype] == 0


def sum_by_lane(
    sch: s_tir.Schedule, sums: SBlockRV, task: LoopRV, around: Sequence[LoopRV], dtype: str
) -> None:
    """Accumulate a register tile, with one load for the next four steps of a row.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    sums : SBlockRV
        Reduction block, whose innermost loops are over rows, columns, `around` and input features.
        See `fits_lanes`.
    task : LoopRV
        A loop around these.
    around : sequence of LoopRV
        Reduction loops outside that over input features, such as those of a convolution's window.
    dtype : str
        Element type of the operands: float32 or bfloat16.
    """
    depth = sch.get_loops(sums)[-1]
    row, column = sch.get_loops(sums)[-3 - len(around) : -1 - len(around)]
    depth, step = sch.split(depth, [None, _STEPS[dtype]])
    column, lane = sch.split(column, [None, LANES])
    sch.reorder(*around, depth, row, column, lane, step)
    sch.unroll(row)
    sch.unroll(column)
    start = sch.decompose_reduction(sums, [*around, depth][0])
    sch.vectorize(sch.get_loops(start)[-1])
    sch.tensorize(lane, _intrinsic(dtype))
    sch.annotate(task, "pragma_import_llvm", _code(dtype))


def _intrinsic(dtype: str) -> str:
    return f"dcnv3_tvm.sum_by_lane_{dtype}"


# LLVM selects a lane of x without an instruction if the shuffle is one of the operands' type.
_MULTIPLY_ADD: Final = """
  %x{0} = shufflevector <4 x float> %x, <4 x float> poison, <4 x i32> splat (i32 {0})
  %sums{1} = call <4 x float> @llvm.fma.v4f32(
      <4 x float> %w{0}, <4 x float> %x{0}, <4 x float> %sums{0})
"""

_DOT: Final = """
  %pairs{0} = bitcast <4 x i32> %w{0} to <8 x bfloat>
  %x{0} = shufflevector <8 x bfloat> %bfloats, <8 x bfloat> poison,
      <8 x i32> <i32 {2}, i32 {3}, i32 {2}, i32 {3}, i32 {2}, i32 {3}, i32 {2}, i32 {3}>
  %sums{1} = call <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(
      <4 x float> %sums{0}, <8 x bfloat> %pairs{0}, <8 x bfloat> %x{0})
"""


def _code(dtype: str) -> str:
    """Return an LLVM function, which LLVM inlines, that adds four products to each of four sums.

    Pairs of bfloat16 are passed as int32. See tvm_workarounds: bfloat16-operands.
    """
    if dtype == "bfloat16":
        given, step = "<4 x i32>", _DOT
        declarations = """
declare <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(<4 x float>, <8 x bfloat>, <8 x bfloat>)
declare <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat>)
"""
        # Without the fence, LLVM loads float32 and finds no operand of type bfloat16.
        start = """
  %loaded = bitcast <4 x i32> %x to <8 x bfloat>
  %bfloats = call <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat> %loaded)
"""
    else:
        given, step, start = "<4 x float>", _MULTIPLY_ADD, ""
        declarations = """
declare <4 x float> @llvm.fma.v4f32(<4 x float>, <4 x float>, <4 x float>)
"""
    arguments = ", ".join(f"{given} %{name}" for name in ("x", "w0", "w1", "w2", "w3"))
    head = f"<4 x float> @dcnv3_tvm_sum_by_lane_{dtype}(<4 x float> %sums0, {arguments})"
    body = "".join(step.format(k, k + 1, PAIR * k, PAIR * k + 1) for k in range(LANES))
    return (
        f"{declarations}define {head} alwaysinline {{{start}{body}"
        f"  ret <4 x float> %sums{LANES}\n}}\n"
    )


@T.prim_func(s_tir=True)
def _description_float32(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1, align=4)
    B = T.match_buffer(b, (4, 4), "float32", offset_factor=1, strides=[T.int32(), 1])
    C = T.match_buffer(c, (4,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:4], A[0:4], B[0:4, 0:4])
        T.writes(C[0:4])
        for i, k in T.grid(4, 4):
            with T.sblock("update"):
                lane, step = T.axis.remap("SR", [i, k])
                C[lane] = C[lane] + A[step] * B[step, lane]


@T.prim_func(s_tir=True)
def _implementation_float32(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1, align=4)
    B = T.match_buffer(b, (4, 4), "float32", offset_factor=1, strides=[T.int32(), 1])
    C = T.match_buffer(c, (4,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:4], A[0:4], B[0:4, 0:4])
        T.writes(C[0:4])
        C[T.ramp(0, 1, 4)] = T.call_pure_extern(
            "float32x4",
            "dcnv3_tvm_sum_by_lane_float32",
            C.vload([0], dtype="float32x4"),
            A.vload([0], dtype="float32x4"),
            B.vload([0, 0], dtype="float32x4"),
            B.vload([1, 0], dtype="float32x4"),
            B.vload([2, 0], dtype="float32x4"),
            B.vload([3, 0], dtype="float32x4"),
        )


@T.prim_func(s_tir=True)
def _description_bfloat16(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (8,), "bfloat16", offset_factor=1, align=2)
    B = T.match_buffer(b, (4, 4, 2), "bfloat16", offset_factor=1, strides=[T.int32(), 2, 1])
    C = T.match_buffer(c, (4,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:4], A[0:8], B[0:4, 0:4, 0:2])
        T.writes(C[0:4])
        for i, k in T.grid(4, 8):
            with T.sblock("update"):
                lane, step = T.axis.remap("SR", [i, k])
                C[lane] = C[lane] + T.cast(A[step], "float32") * T.cast(
                    B[step // 2, lane, step % 2], "float32"
                )


@T.prim_func(s_tir=True)
def _implementation_bfloat16(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (8,), "bfloat16", offset_factor=1, align=2)
    B = T.match_buffer(b, (4, 4, 2), "bfloat16", offset_factor=1, strides=[T.int32(), 2, 1])
    C = T.match_buffer(c, (4,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:4], A[0:8], B[0:4, 0:4, 0:2])
        T.writes(C[0:4])
        C[T.ramp(0, 1, 4)] = T.call_pure_extern(
            "float32x4",
            "dcnv3_tvm_sum_by_lane_bfloat16",
            C.vload([0], dtype="float32x4"),
            T.reinterpret("int32x4", A.vload([0], dtype="bfloat16x8")),
            T.reinterpret("int32x4", B.vload([0, 0, 0], dtype="bfloat16x8")),
            T.reinterpret("int32x4", B.vload([1, 0, 0], dtype="bfloat16x8")),
            T.reinterpret("int32x4", B.vload([2, 0, 0], dtype="bfloat16x8")),
            T.reinterpret("int32x4", B.vload([3, 0, 0], dtype="bfloat16x8")),
        )


TensorIntrin.register(_intrinsic("float32"), _description_float32, _implementation_float32)
TensorIntrin.register(_intrinsic("bfloat16"), _description_bfloat16, _implementation_bfloat16)
