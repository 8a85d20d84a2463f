"""Tensor intrinsics of tensor cores: ``ldmatrix``, ``mma``, clearing and storing of sums.

A warp holds a 16x16 fragment in registers, eight elements a thread. `fragment` and
`transposed_fragment` map an element to its thread and register, in the layouts of the PTX
instructions ``ldmatrix.x4`` and ``mma.m16n8k16``, two of which multiply 16x16x16.
"""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import functools
from typing import Any, Final

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

_PAIR: Final = """
__forceinline__ __device__ float2 dcnv3_tvm_pair(float* from) { return *(float2*)from; }
"""
"""Loads two neighbouring registers. See tvm_workarounds: warp-vectors."""

_PTX: Final = {"float16": "fp16", "bfloat16": "bf16"}


def fragment(row: Any, column: Any) -> tuple[Any, Any]:
    """Return thread and register of an element of the left operand or of the sums."""
    thread = row % 8 * 4 + column % 8 // 2
    return thread, column // 8 * 4 + row // 8 * 2 + column % 2


def transposed_fragment(row: Any, column: Any) -> tuple[Any, Any]:
    """Return thread and register of an element (column, depth) of the right operand."""
    thread = row % 8 * 4 + column % 8 // 2
    return thread, row // 8 * 4 + column // 8 * 2 + column % 2


def row_address(thread: Any, stride: Any) -> Any:
    """Return the address that a thread passes to ``ldmatrix`` for the left operand.

    Threads 8i to 8i+7 pass the rows of the 8x8 matrix i.
    """
    return thread % 16 * stride + thread // 16 * 8


def transposed_row_address(thread: Any, stride: Any) -> Any:
    """Return the address that a thread passes to ``ldmatrix`` for the right operand."""
    return (thread // 16 * 8 + thread % 8) * stride + thread % 16 // 8 * 8


@functools.cache
def load(dtype: str, *, second: bool) -> str:
    """Register the intrinsic that loads a fragment from shared memory, and return its name."""
    place = transposed_fragment if second else fragment
    address = transposed_row_address if second else row_address

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle):
        Shared = T.match_buffer(a, (16, 16), dtype, align=64, offset_factor=16, scope="shared.dyn")
        Warp = T.match_buffer(b, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads(Shared[0:16, 0:16])
            T.writes(Warp[0:32, 0:8])
            for i, j in T.grid(16, 16):
                with T.sblock("load"):
                    row, column = T.axis.remap("SS", [i, j])
                    at = T.meta_var(place(row, column))
                    Warp[at[0], at[1]] = Shared[row, column]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle):
        s0 = T.int32()
        s1 = T.int32()
        Shared = T.match_buffer(
            a, (16, 16), dtype, align=64, offset_factor=16, scope="shared.dyn", strides=[s0, s1]
        )
        Warp = T.match_buffer(b, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads(Shared[0:16, 0:16])
            T.writes(Warp[0:32, 0:8])
            for thread in T.thread_binding(0, 32, "threadIdx.x"):
                T.evaluate(
                    T.ptx_legacy.ldmatrix(
                        False,
                        4,
                        ".b16",
                        Warp.data,
                        Warp.elem_offset + 8 * thread,
                        Shared.access_ptr("r"),
                        address(thread, s0),
                        dtype=dtype,
                    )
                )

    kind = "second" if second else "first"
    return _register(f"dcnv3_tvm.ldmatrix_{kind}_{dtype}", description, implementation)


@functools.cache
def multiply(dtype: str) -> str:
    """Register the intrinsic that multiplies and accumulates fragments, and return its name."""
    ptx = _PTX[dtype]

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        B = T.match_buffer(b, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads(C[0:32, 0:8], A[0:32, 0:8], B[0:32, 0:8])
            T.writes(C[0:32, 0:8])
            for i, j, k in T.grid(16, 16, 16):
                with T.sblock("multiply"):
                    m, n, d = T.axis.remap("SSR", [i, j, k])
                    to = T.meta_var(fragment(m, n))
                    first = T.meta_var(fragment(m, d))
                    second = T.meta_var(transposed_fragment(n, d))
                    C[to[0], to[1]] = C[to[0], to[1]] + T.Cast(
                        "float32", A[first[0], first[1]]
                    ) * T.Cast("float32", B[second[0], second[1]])

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        B = T.match_buffer(b, (32, 8), dtype, align=64, offset_factor=16, scope="warp")
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads(C[0:32, 0:8], A[0:32, 0:8], B[0:32, 0:8])
            T.writes(C[0:32, 0:8])
            for thread in T.thread_binding(0, 32, "threadIdx.x"):
                for half in T.serial(2):
                    T.evaluate(
                        T.ptx_legacy.mma(
                            "m16n8k16",
                            "row",
                            "col",
                            ptx,
                            ptx,
                            "fp32",
                            A.data,
                            A.elem_offset + 8 * thread,
                            B.data,
                            B.elem_offset + 8 * thread + 4 * half,
                            C.data,
                            C.elem_offset + 8 * thread + 4 * half,
                            False,
                            dtype="float32",
                        )
                    )

    return _register(f"dcnv3_tvm.mma_{dtype}", description, implementation)


@functools.cache
def clear() -> str:
    """Register the intrinsic that clears the sums, and return its name."""

    @T.prim_func(s_tir=True)
    def description(c: T.handle):
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:32, 0:8])
            for i, j in T.grid(16, 16):
                with T.sblock("clear"):
                    row, column = T.axis.remap("SS", [i, j])
                    to = T.meta_var(fragment(row, column))
                    C[to[0], to[1]] = T.float32(0)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle):
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:32, 0:8])
            for _thread in T.thread_binding(0, 32, "threadIdx.x"):
                T.evaluate(T.cuda.mma_fill_legacy(8, C.data, C.elem_offset, dtype="float32"))

    return _register("dcnv3_tvm.clear_sums", description, implementation)


@functools.cache
def store() -> str:
    """Register the intrinsic that stores the sums to shared memory, and return its name."""

    @T.prim_func(s_tir=True)
    def description(c: T.handle, d: T.handle):
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        D = T.match_buffer(d, (16, 16), "float32", align=64, offset_factor=16, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(C[0:32, 0:8])
            T.writes(D[0:16, 0:16])
            for i, j in T.grid(16, 16):
                with T.sblock("store"):
                    row, column = T.axis.remap("SS", [i, j])
                    at = T.meta_var(fragment(row, column))
                    D[row, column] = C[at[0], at[1]]

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle, d: T.handle):
        s0 = T.int32()
        s1 = T.int32()
        C = T.match_buffer(c, (32, 8), "float32", align=64, offset_factor=16, scope="warp")
        D = T.match_buffer(
            d,
            (16, 16),
            "float32",
            align=64,
            offset_factor=16,
            scope="shared.dyn",
            strides=[s0, s1],
        )
        with T.sblock("root"):
            T.reads(C[0:32, 0:8])
            T.writes(D[0:16, 0:16])
            for thread in T.thread_binding(0, 32, "threadIdx.x"):
                # In pairs, because single elements have bank conflicts.
                for pair in T.serial(4):
                    D[
                        thread // 4 + pair % 2 * 8,
                        T.Ramp(thread % 4 * 2 + pair // 2 * 8, 1, 2),
                    ] = T.cuda.func_call(
                        "dcnv3_tvm_pair",
                        T.address_of(C[thread, pair * 2]),
                        source_code=_PAIR,
                        return_type="float32x2",
                    )

    return _register("dcnv3_tvm.store_sums", description, implementation)


def _register(name: str, description: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    TensorIntrin.register(name, description, implementation, override=True)
    return name
