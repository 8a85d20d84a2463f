"""Functions that the kernels in blocks of matrix tiles call, in LLVM code for any processor.

Schedules for processors with AMX replace the code.
"""

from __future__ import annotations

from typing import Final

from dcnv3_tvm.kernels.packing import BLOCK, TILE

BEGIN: Final = "dcnv3_tvm_tiles_begin"
"""Called before others with the rows of a tile."""

SUM_BLOCK: Final = "dcnv3_tvm_tiles_sum"
"""Stores the sums of a block of two tiles by two."""

END: Final = "dcnv3_tvm_tiles_end"
"""Called after others."""

PARAMETERS: Final = (
    "ptr %sums, ptr %x, i64 %row, i64 %skip, i64 %runs, i64 %pitch, ptr %weight, i64 %steps, "
    "i64 %last, i64 %rows, i64 %second, ptr %next, i32 %part, i64 %lines"
)
"""Of `SUM_BLOCK`: sums, in rows of `BLOCK`; first row of x; bytes of x from one row of a tile to
the next, and from the first tile to the second; runs along the depth, and bytes of x from one to
the next; weights of the block; steps of a run, and bytes of x from the first to the last; rows of a
tile; rows of the sums from the first tile to the second, which may overlap; weights of the next
column of blocks, which part of them to prefetch, and cache lines to prefetch in each step."""

TILE_BYTES: Final = 64 * TILE

IMPORT_CODE: Final = "pragma_import_llvm"
"""Annotation of a loop with the code of the functions that are called in it."""

PORTABLE_CODE: Final = f"""
declare i64 @llvm.smin.i64(i64, i64)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)

define i32 @{BEGIN}(i64 %rows) {{
  ret i32 0
}}

define i32 @{END}() {{
  ret i32 0
}}

define i32 @{SUM_BLOCK}({PARAMETERS}) {{
entry:
  %height = add i64 %second, %rows
  br label %line
line:
  %i = phi i64 [0, %entry], [%i1, %stored]
  %lower = icmp sge i64 %i, %second
  %tile0 = select i1 %lower, i64 %skip, i64 0
  %rows0 = select i1 %lower, i64 %second, i64 0
  %inside = sub i64 %i, %rows0
  %along = mul i64 %inside, %row
  %from = add i64 %tile0, %along
  %xrow = getelementptr i8, ptr %x, i64 %from
  br label %half
half:
  %h = phi i64 [0, %line], [%h1, %summed]
  %side = mul i64 %h, {TILE_BYTES}
  %columns = getelementptr i8, ptr %weight, i64 %side
  br label %run
run:
  %r = phi i64 [0, %half], [%r1, %ran]
  %sum3 = phi <16 x float> [zeroinitializer, %half], [%sum2, %ran]
  %before = mul i64 %r, %steps
  %down = mul i64 %r, %pitch
  %xrun = getelementptr i8, ptr %xrow, i64 %down
  br label %step
step:
  %s = phi i64 [0, %run], [%s1, %paired]
  %sum0 = phi <16 x float> [%sum3, %run], [%sum2, %paired]
  %whole = mul i64 %s, {2 * BLOCK}
  %start = call i64 @llvm.smin.i64(i64 %whole, i64 %last)
  %xstep = getelementptr i8, ptr %xrun, i64 %start
  %number = add i64 %before, %s
  %tile = mul i64 %number, {2 * TILE_BYTES}
  %wstep = getelementptr i8, ptr %columns, i64 %tile
  br label %pair
pair:
  %p = phi i64 [0, %step], [%p1, %pair]
  %sum1 = phi <16 x float> [%sum0, %step], [%sum2, %pair]
  %xpair = getelementptr i32, ptr %xstep, i64 %p
  %both = load i32, ptr %xpair, align 2
  %x0 = shl i32 %both, 16
  %x1 = and i32 %both, -65536
  %xs0 = insertelement <16 x i32> poison, i32 %x0, i64 0
  %xv0 = shufflevector <16 x i32> %xs0, <16 x i32> poison, <16 x i32> zeroinitializer
  %xf0 = bitcast <16 x i32> %xv0 to <16 x float>
  %xs1 = insertelement <16 x i32> poison, i32 %x1, i64 0
  %xv1 = shufflevector <16 x i32> %xs1, <16 x i32> poison, <16 x i32> zeroinitializer
  %xf1 = bitcast <16 x i32> %xv1 to <16 x float>
  %wpair = getelementptr <16 x i32>, ptr %wstep, i64 %p
  %w = load <16 x i32>, ptr %wpair, align 4
  %w0 = shl <16 x i32> %w, splat (i32 16)
  %wf0 = bitcast <16 x i32> %w0 to <16 x float>
  %w1 = and <16 x i32> %w, splat (i32 -65536)
  %wf1 = bitcast <16 x i32> %w1 to <16 x float>
  %first = call <16 x float> @llvm.fmuladd.v16f32(
      <16 x float> %xf0, <16 x float> %wf0, <16 x float> %sum1)
  %sum2 = call <16 x float> @llvm.fmuladd.v16f32(
      <16 x float> %xf1, <16 x float> %wf1, <16 x float> %first)
  %p1 = add i64 %p, 1
  %pdone = icmp eq i64 %p1, {TILE}
  br i1 %pdone, label %paired, label %pair
paired:
  %s1 = add i64 %s, 1
  %sdone = icmp eq i64 %s1, %steps
  br i1 %sdone, label %ran, label %step
ran:
  %r1 = add i64 %r, 1
  %rdone = icmp eq i64 %r1, %runs
  br i1 %rdone, label %summed, label %run
summed:
  %index = mul i64 %i, 2
  %place = add i64 %index, %h
  %address = getelementptr <16 x float>, ptr %sums, i64 %place
  store <16 x float> %sum2, ptr %address, align 4
  %h1 = add i64 %h, 1
  %hdone = icmp eq i64 %h1, 2
  br i1 %hdone, label %stored, label %half
stored:
  %i1 = add i64 %i, 1
  %idone = icmp eq i64 %i1, %height
  br i1 %idone, label %exit, label %line
exit:
  ret i32 0
}}
"""
