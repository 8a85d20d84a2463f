"""Accumulate a matmul tile by `vdpbf16ps`, which multiplies and adds pairs of bfloat16."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
from typing import Final

from tvm import s_tir
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from dcnv3_tvm.kernels.packing import PAIR

_DOT: Final = "dcnv3_tvm.dot_bf16_16x2"
_LANES: Final = 16

# Pairs are passed as int32 to this function, which LLVM inlines.
# See tvm_workarounds: bfloat16-operands.
_CODE: Final = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @dcnv3_tvm_dot_bf16(<16 x float> %sums, <16 x i32> %first, <16 x i32> %second) {
  %a = bitcast <16 x i32> %first to <32 x bfloat>
  %b = bitcast <16 x i32> %second to <32 x bfloat>
  %result = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sums, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %result
}
"""


def sum_pairs(sch: s_tir.Schedule, sums: SBlockRV, task: LoopRV) -> LoopRV:
    """Accumulate a register tile by dot products of bfloat16 pairs.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    sums : SBlockRV
        Reduction block, whose innermost loops are over rows, columns and input features.
    task : LoopRV
        A loop around these.

    Returns
    -------
    LoopRV
        The loop over pairs of input features.
    """
    *_, row, column, depth = sch.get_loops(sums)
    depth, pair = sch.split(depth, [None, PAIR])
    column, lane = sch.split(column, [None, _LANES])
    sch.reorder(depth, row, column, lane, pair)
    sch.unroll(row)
    sch.unroll(column)
    start = sch.decompose_reduction(sums, depth)
    sch.vectorize(sch.get_loops(start)[-1])
    sch.tensorize(lane, _DOT)
    sch.annotate(task, "pragma_import_llvm", _CODE)
    return depth


@T.prim_func(s_tir=True)
def _description(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (2,), "bfloat16", offset_factor=1, align=2)
    B = T.match_buffer(b, (16, 2), "bfloat16", offset_factor=1)
    C = T.match_buffer(c, (16,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:16], A[0:2], B[0:16, 0:2])
        T.writes(C[0:16])
        for i in T.serial(0, 16):
            for k in T.serial(0, 2):
                with T.sblock("update"):
                    lane, element = T.axis.remap("SR", [i, k])
                    C[lane] = C[lane] + T.cast(A[element], "float32") * T.cast(
                        B[lane, element], "float32"
                    )


@T.prim_func(s_tir=True)
def _implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (2,), "bfloat16", offset_factor=1, align=2)
    B = T.match_buffer(b, (16, 2), "bfloat16", offset_factor=1)
    C = T.match_buffer(c, (16,), "float32", offset_factor=1, scope="local")
    with T.sblock("root"):
        T.reads(C[0:16], A[0:2], B[0:16, 0:2])
        T.writes(C[0:16])
        C[T.ramp(0, 1, 16)] = T.call_pure_extern(
            "float32x16",
            "dcnv3_tvm_dot_bf16",
            C.vload([0], dtype="float32x16"),
            T.broadcast(T.reinterpret("int32", A.vload([0], "bfloat16x2")), 16),
            T.reinterpret("int32x16", B.vload([0, 0], dtype="bfloat16x32")),
        )


TensorIntrin.register(_DOT, _description, _implementation)
