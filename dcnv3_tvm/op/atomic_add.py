"""Atomic additions of vectors to global memory, as calls of CUDA code.

From compute capability 9.0 on, one instruction adds a float32 vector. Elsewhere, and for float64,
each element takes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm.backend.cuda.op import cuda_func_call

_SOURCE: Final = """
static __device__ __forceinline__ void {name}({type} *to, {type} factor, {parameters}) {{
  if (factor == 0) return;
{body}}}
"""

# Not atomicAdd, which returns the old value: nvcc keeps that for vectors, even if it is not used.
_VECTOR: Final = """#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v{count}.f32 [%0], {{{numbers}}};"
               : : "l"(to), {operands} : "memory");
#else
{scalar}#endif
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
    kind = {"float32": "float", "float64": "double"}[str(factor.ty.dtype)]
    count = len(values)
    name = f"dcnv3_tvm_add_{kind}{count}"
    products = [f"factor * value{i}" for i in range(count)]
    body = "".join(f"  atomicAdd(to + {i}, {product});\n" for i, product in enumerate(products))
    if kind == "float" and count > 1:
        body = _VECTOR.format(
            count=count,
            numbers=", ".join(f"%{i + 1}" for i in range(count)),
            operands=", ".join(f'"f"({product})' for product in products),
            scalar=body,
        )
    parameters = ", ".join(f"{kind} value{i}" for i in range(count))
    source = _SOURCE.format(name=name, type=kind, parameters=parameters, body=body)
    return cuda_func_call(name, address, factor, *values, source_code=source)
