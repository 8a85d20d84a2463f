"""DCNv3 and InternImage compiled with TVM.

Public names are imported on first use, so ``import dcnv3_tvm`` imports neither PyTorch nor TVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm.lazy_names import lazy_names

if TYPE_CHECKING:
    from dcnv3_tvm.compiler.compile import compile_artifact, compile_model
    from dcnv3_tvm.compiler.explain import explain
    from dcnv3_tvm.compiler.operator import compile_op
    from dcnv3_tvm.errors import DCNv3Error
    from dcnv3_tvm.functional import dcnv3
    from dcnv3_tvm.runtime import CompiledModel, load
    from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

__version__ = "0.1.0"

_MODULES = {
    "CompiledModel": "dcnv3_tvm.runtime",
    "DCNv3Error": "dcnv3_tvm.errors",
    "DCNv3Params": "dcnv3_tvm.spec",
    "DCNv3Spec": "dcnv3_tvm.spec",
    "compile_artifact": "dcnv3_tvm.compiler.compile",
    "compile_model": "dcnv3_tvm.compiler.compile",
    "compile_op": "dcnv3_tvm.compiler.operator",
    "dcnv3": "dcnv3_tvm.functional",
    "explain": "dcnv3_tvm.compiler.explain",
    "load": "dcnv3_tvm.runtime",
}

__all__ = [
    "CompiledModel",
    "DCNv3Error",
    "DCNv3Params",
    "DCNv3Spec",
    "compile_artifact",
    "compile_model",
    "compile_op",
    "dcnv3",
    "explain",
    "load",
]


__getattr__, __dir__ = lazy_names(__name__, _MODULES)
