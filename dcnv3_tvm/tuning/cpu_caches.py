"""Bring the CPU's caches into the state in which a model calls a kernel."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import ctypes
import functools
from typing import Any, Final

import numpy as np
import tvm
import tvm_ffi
from tvm.script import tirx as T

from dcnv3_tvm.runtime import tensors

PREPARE: Final = "dcnv3_tvm.tuning.prepare_caches"
"""Name of the packed function; it takes the arguments of the kernel."""

_FLUSH: Final = "cache_flush_cpu_non_first_arg"


def register() -> None:
    """Register the function `PREPARE` in this process.

    It evicts all arguments but the first from the caches: weights come from memory. The first is
    written by all threads, each a contiguous part, as the kernel before does in a model: what a
    thread reads of another's part comes from another core.
    """
    tvm_ffi.register_global_func(PREPARE, _prepare, override=True)


def _prepare(*arguments: Any) -> None:
    tvm_ffi.get_global_func(_FLUSH)(*arguments)
    # TVM's RPC server passes pointers, of which it takes no views.
    memory = (ctypes.c_uint8 * tensors.total_bytes(arguments[:1])).from_address(
        arguments[0].data_ptr()
    )
    _rewrite()(np.ctypeslib.as_array(memory), 0)


@functools.cache
def _rewrite() -> Any:
    """Compile a function that writes the values which a tensor has."""

    # The compiler must not know that the value is zero: it would remove the loop.
    @T.prim_func(s_tir=True)
    def rewrite(data: T.handle, zero: T.uint8) -> None:
        size = T.int64()
        values = T.match_buffer(data, (size,), "uint8")
        for i in T.parallel(size):
            with T.sblock("rewrite"):
                at = T.axis.spatial(size, i)
                values[at] = values[at] ^ zero

    module = tvm.IRModule({"main": rewrite.with_attr("global_symbol", "main")})
    return tvm.compile(module, target="llvm")["main"]
