"""Passes for CPU kernels that complete passes of TVM."""

from __future__ import annotations

import math
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import ir, tirx

from dcnv3_tvm import targets

STACK_BYTES: Final = 4096
"""Largest buffer of a kernel that is allocated on the stack: the sums of a tile."""


@tirx.transform.prim_func_pass(opt_level=0, name="dcnv3_tvm.AllocateOnStack")
def allocate_on_stack(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Allocate small buffers of static size on the stack, before LowerTVMBuiltin.

    See tvm_workarounds: stack-buffers.
    """
    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.AllocBuffer, _on_stack)))


def _on_stack(allocation: tirx.AllocBuffer) -> tirx.AllocBuffer:
    buffer = allocation.buffer
    sizes = [int(size) for size in buffer.shape if isinstance(size, tirx.IntImm)]
    element = tvm.DataType(str(buffer.dtype)).itemsize
    if len(sizes) < len(buffer.shape) or math.prod(sizes) * element > STACK_BYTES:
        return allocation
    annotations = {**allocation.annotations, "disable_lower_builtin": tirx.IntImm("int32", 1)}
    return tirx.AllocBuffer(buffer, annotations)


_LANES: Final = (4, 8, 16)
"""Vectors that are rounded by one or two instructions."""

_ROUND: Final = "dcnv3_tvm_bfloat16"

# Of 16-bit integers, because TVM has replaced the type bfloat16 when the pass runs.
_ROUND_CODE: Final = "".join(
    f"""
define <{lanes} x i16> @{_ROUND}x{lanes}(<{lanes} x float> %value) alwaysinline {{
  %rounded = fptrunc <{lanes} x float> %value to <{lanes} x bfloat>
  %bits = bitcast <{lanes} x bfloat> %rounded to <{lanes} x i16>
  ret <{lanes} x i16> %bits
}}
"""
    for lanes in _LANES
)


@tirx.transform.prim_func_pass(opt_level=0, name="dcnv3_tvm.RoundToBfloat16")
def round_to_bfloat16(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Convert vectors of float32 to bfloat16 by the processor's instruction.

    See tvm_workarounds: bfloat16-rounding.
    """
    target = func.attrs["target"]
    present = targets.target_features(target)
    if ("bf16" if targets.is_aarch64(target) else "avx512bf16") not in present:
        return func
    body = tvm_ffi.structural_map(func.body, (tirx.Cast, _round))
    if body.same_as(func.body):
        return func
    code = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", _ROUND_CODE, body)
    return func.with_body(code)


def _round(cast: tirx.Cast) -> ir.Expr:
    value = _rounded(cast)
    lanes = tvm.DataType(str(cast.ty.dtype)).lanes
    if value is None or lanes not in _LANES:
        return cast
    real = tirx.reinterpret(f"float32x{lanes}", value)
    return tirx.call_pure_extern(f"uint16x{lanes}", f"{_ROUND}x{lanes}", real)


def _rounded(cast: tirx.Cast) -> ir.Expr | None:
    """Return x of ``uint16((x + (((x >> 16) & 1) + 32767)) >> 16)``, TVM's rounding of x."""
    total = _left(cast.value, tirx.RShift, 16)
    if not isinstance(total, tirx.Add):
        return None
    even = _left(_left(total.b, tirx.Add, 32767), tirx.BitwiseAnd, 1)
    bits = _left(even, tirx.RShift, 16)
    return bits if bits is not None and tvm_ffi.structural_equal(bits, total.a) else None


def _left(expression: Any, operation: Any, right: int) -> Any:
    """Return the left operand of a vector operation with a constant; otherwise None."""
    if not isinstance(expression, operation) or not isinstance(expression.b, tirx.Broadcast):
        return None
    constant = expression.b.value
    matches = isinstance(constant, tirx.IntImm) and int(constant.value) == right
    return expression.a if matches else None
