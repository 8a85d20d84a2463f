"""LLVM code of the functions of `dcnv3_tvm.kernels.tile_functions` for processors with AMX."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
from typing import Final

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from dcnv3_tvm.kernels.packing import BLOCK, TILE
from dcnv3_tvm.kernels.tile_functions import BEGIN, END, PARAMETERS, SUM_BLOCK, TILE_BYTES

# Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of the weight.
_TILE_ROWS: Final = ("%count",) * 6 + (str(TILE),) * 2

# Layout of a tile configuration: palette, row bytes of each tile from byte 16, rows from byte 48.
_CONFIGURATION: Final = "".join(
    f"""
  %bytes{tile} = getelementptr i8, ptr %configuration, i64 {16 + 2 * tile}
  store i16 64, ptr %bytes{tile}
  %rows{tile} = getelementptr i8, ptr %configuration, i64 {48 + tile}
  store i8 {rows}, ptr %rows{tile}"""
    for tile, rows in enumerate(_TILE_ROWS)
)

# Where the other hyperthread of a core is busy, tile instructions one after another take 1.3 to 1.6
# times as long as with others between them (Emerald Rapids); alone, a core hides the latter.
_APART: Final = f'call void asm sideeffect "{"nop;" * 8}", ""()'

AMX_CODE: Final = f"""
define <16 x i16> @dcnv3_tvm_round_bf16(<16 x float> %values) {{
  %rounded = fptrunc <16 x float> %values to <16 x bfloat>
  %result = bitcast <16 x bfloat> %rounded to <16 x i16>
  ret <16 x i16> %result
}}

declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)

define i32 @{BEGIN}(i64 %rows) {{
  %configuration = alloca [64 x i8], align 64
  store <64 x i8> zeroinitializer, ptr %configuration, align 64
  store i8 1, ptr %configuration
  %count = trunc i64 %rows to i8{_CONFIGURATION}
  call void @llvm.x86.ldtilecfg(ptr %configuration)
  ret i32 0
}}

define i32 @{END}() {{
  call void @llvm.x86.tilerelease()
  ret i32 0
}}

define i32 @{SUM_BLOCK}({PARAMETERS}) {{
entry:
  %part0 = sext i32 %part to i64
  %part1 = mul i64 %part0, %runs
  %part2 = mul i64 %part1, %steps
  %part3 = mul i64 %part2, %lines
  %part4 = mul i64 %part3, 64
  %ahead = getelementptr i8, ptr %next, i64 %part4
  call void @llvm.x86.tilezero(i8 0)
  call void @llvm.x86.tilezero(i8 1)
  call void @llvm.x86.tilezero(i8 2)
  call void @llvm.x86.tilezero(i8 3)
  br label %run
run:
  %r = phi i64 [0, %entry], [%r1, %ran]
  %before = mul i64 %r, %steps
  %down = mul i64 %r, %pitch
  %xrun = getelementptr i8, ptr %x, i64 %down
  br label %step
step:
  %s = phi i64 [0, %run], [%s1, %stepped]
  %whole = mul i64 %s, {2 * BLOCK}
  %start = call i64 @llvm.smin.i64(i64 %whole, i64 %last)
  %upper = getelementptr i8, ptr %xrun, i64 %start
  %lower = getelementptr i8, ptr %upper, i64 %skip
  %number = add i64 %before, %s
  %tile = mul i64 %number, {2 * TILE_BYTES}
  %left = getelementptr i8, ptr %weight, i64 %tile
  %right = getelementptr i8, ptr %left, i64 {TILE_BYTES}
  call void @llvm.x86.tileloadd64(i8 6, ptr %left, i64 64)
  {_APART}
  call void @llvm.x86.tileloadd64(i8 4, ptr %upper, i64 %row)
  {_APART}
  call void @llvm.x86.tdpbf16ps(i8 0, i8 4, i8 6)
  {_APART}
  call void @llvm.x86.tileloadd64(i8 7, ptr %right, i64 64)
  {_APART}
  call void @llvm.x86.tdpbf16ps(i8 1, i8 4, i8 7)
  {_APART}
  call void @llvm.x86.tileloadd64(i8 5, ptr %lower, i64 %row)
  {_APART}
  call void @llvm.x86.tdpbf16ps(i8 2, i8 5, i8 6)
  {_APART}
  call void @llvm.x86.tdpbf16ps(i8 3, i8 5, i8 7)
  {_APART}
  %number0 = mul i64 %number, %lines
  br label %line
line:
  %l = phi i64 [0, %step], [%l1, %line]
  %ahead0 = add i64 %number0, %l
  %ahead1 = mul i64 %ahead0, 64
  %ahead2 = getelementptr i8, ptr %ahead, i64 %ahead1
  call void @llvm.prefetch.p0(ptr %ahead2, i32 0, i32 2, i32 1)
  %l1 = add i64 %l, 1
  %ldone = icmp eq i64 %l1, %lines
  br i1 %ldone, label %stepped, label %line
stepped:
  %s1 = add i64 %s, 1
  %sdone = icmp eq i64 %s1, %steps
  br i1 %sdone, label %ran, label %step
ran:
  %r1 = add i64 %r, 1
  %rdone = icmp eq i64 %r1, %runs
  br i1 %rdone, label %exit, label %run
exit:
  %right0 = getelementptr i8, ptr %sums, i64 64
  %below = mul i64 %second, {4 * BLOCK}
  %left1 = getelementptr i8, ptr %sums, i64 %below
  %right1 = getelementptr i8, ptr %left1, i64 64
  call void @llvm.x86.tilestored64(i8 0, ptr %sums, i64 {4 * BLOCK})
  call void @llvm.x86.tilestored64(i8 1, ptr %right0, i64 {4 * BLOCK})
  call void @llvm.x86.tilestored64(i8 2, ptr %left1, i64 {4 * BLOCK})
  call void @llvm.x86.tilestored64(i8 3, ptr %right1, i64 {4 * BLOCK})
  ret i32 0
}}
"""


ROUND: Final = "dcnv3_tvm.round_bf16_16"
"""Tensor intrinsic that rounds 16 values to bfloat16 in one instruction instead of TVM's six."""


@T.prim_func(s_tir=True)
def _description(a: T.handle, b: T.handle) -> None:
    A = T.match_buffer(a, (16,), "float32", offset_factor=1, scope="local")
    B = T.match_buffer(b, (16,), "bfloat16", offset_factor=1, align=2)
    with T.sblock("root"):
        T.reads(A[0:16])
        T.writes(B[0:16])
        for i in T.serial(0, 16):
            with T.sblock("round"):
                lane = T.axis.remap("S", [i])
                B[lane] = T.cast(A[lane], "bfloat16")


@T.prim_func(s_tir=True)
def _implementation(a: T.handle, b: T.handle) -> None:
    A = T.match_buffer(a, (16,), "float32", offset_factor=1, scope="local")
    B = T.match_buffer(b, (16,), "bfloat16", offset_factor=1, align=2)
    with T.sblock("root"):
        T.reads(A[0:16])
        T.writes(B[0:16])
        B[T.ramp(0, 1, 16)] = T.reinterpret(
            "bfloat16x16",
            T.call_pure_extern(
                "uint16x16", "dcnv3_tvm_round_bf16", A.vload([0], dtype="float32x16")
            ),
        )


TensorIntrin.register(ROUND, _description, _implementation)
