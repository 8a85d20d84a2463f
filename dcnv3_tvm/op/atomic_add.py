"""Atomic additions of vectors to global memory, as calls of CUDA code.

From compute capability 9.0 on, one instruction adds a float32 vector. Elsewhere, and for float64,
each element takes one. They are written in PTX: nvcc keeps the old value that ``atomicAdd`` returns
for a vector, even if it is not used. And they have a predicate instead of a branch, because threads
that diverge must not exchange values by shuffles afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm.backend.cuda.op import cuda_func_call

_SOURCE: Final = """
static __device__ __forceinline__ void {name}({type} *to, {type} factor, {parameters}) {{
{body}}}
"""

_ASM: Final = """  asm volatile("{{ .reg .pred p; setp.neu.{ptx} p, %1, {zero}; {instructions} }}"
               : : "l"(to), "{constraint}"(factor), {operands} : "memory");
"""


def add_multiple(address: Any, factor: Any, values: Sequence[Any]) -> Any:
    """Build the statement that adds a multiple of some values to adjacent elements.

    Nothing is added where the factor is zero, whatever the values.

    Parameters
    ----------
    address : tvm.tirx.PrimExpr
        Address of the first element, aligned to the size of all of them.
    factor : tvm.tirx.PrimExpr
        float32 or float64.
    values : sequence of tvm.tirx.PrimExpr
        1, 2 or 4 values of the type of the factor.
    """
    single = str(factor.ty.dtype) == "float32"
    kind, ptx, constraint = ("float", "f32", "f") if single else ("double", "f64", "d")
    count, size = len(values), 4 if single else 8
    places = [f"%{i + 2}" for i in range(count)]
    elements = " ".join(
        f"@p red.global.add.{ptx} [%0+{size * i}], {place};" for i, place in enumerate(places)
    )
    vector = f"@p red.global.add.v{count}.{ptx} [%0], {{{', '.join(places)}}};"
    scalar_body, vector_body = (
        _ASM.format(
            ptx=ptx,
            zero="0f00000000" if single else "0d0000000000000000",
            instructions=instructions,
            constraint=constraint,
            operands=", ".join(f'"{constraint}"(factor * value{i})' for i in range(count)),
        )
        for instructions in (elements, vector)
    )
    has_vector = single and count > 1
    name = f"dcnv3_tvm_add_{kind}{count}"
    source = _SOURCE.format(
        name=name,
        type=kind,
        parameters=", ".join(f"{kind} value{i}" for i in range(count)),
        body=f"#if __CUDA_ARCH__ >= 900\n{vector_body}#else\n{scalar_body}#endif\n"
        if has_vector
        else scalar_body,
    )
    return cuda_func_call(name, address, factor, *values, source_code=source)
