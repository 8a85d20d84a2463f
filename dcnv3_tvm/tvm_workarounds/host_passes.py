"""Passes for CPU kernels that complete passes of TVM."""

from __future__ import annotations

import math
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import tirx

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
