"""Lower packed DCNv3 operators to kernels, on CPUs and GPUs."""

from __future__ import annotations

from tvm import relax

from dcnv3_tvm.op import relax_packed_op
from dcnv3_tvm.transform.ir import Rebuilder


def lower_sampling(
    rebuilder: Rebuilder, var: relax.Var, call: relax.Call, out_dtype: str, *, vector_loads: bool
) -> relax.Var:
    """Call the kernel of a packed DCNv3, for the element types that its arguments have.

    Parameters
    ----------
    rebuilder : Rebuilder
        Rebuilds the function with the call.
    var : relax.Var
        The result in the old function.
    call : relax.Call
        Call of an operator of `dcnv3_tvm.op.relax_packed_op`, with arguments of the new function.
    out_dtype : str
        Element type in which the result is stored.
    vector_loads : bool
        Whether to use the variant of the kernel for GPUs.
    """
    kernel = relax_packed_op.kernel_of(call, out_dtype, vector_loads=vector_loads)
    function = rebuilder.add_kernel(kernel, relax_packed_op.kernel_name(call))
    ty = relax.TensorType(var.ty.shape, out_dtype)
    return rebuilder.emit(relax.call_tir(function, list(call.args), ty), like=var)
